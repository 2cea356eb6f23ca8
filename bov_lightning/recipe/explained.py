"""What each key means, as `bov fit --keys` prints it and docs/keys.md lists it."""

import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from docstring_parser import parse_from_object

from bov_lightning.kinds import in_words
from bov_lightning.model.lookup import named_sources
from bov_lightning.recipe.annotations import dataclass_of, hints_of
from bov_lightning.recipe.sections import Recipe


class Key(NamedTuple):
    """One key, or one argument of a class."""

    name: str
    """Its own name, the last part of the dotted key."""
    meaning: str
    """One line."""
    words: str
    """What may stand there; "section" where there are keys below it."""
    default: str
    """As YAML, "required", or "" for a section."""
    section: type | None = None
    """The dataclass of the keys below it."""


def keys_of(cls: type) -> Iterator[Key]:
    """The keys of a dataclass, or the arguments of a class that recipes name."""
    is_section = dataclasses.is_dataclass(cls)
    documented = parse_from_object(cls if is_section else cls.__init__).params
    meanings = {entry.arg_name: " ".join((entry.description or "").split()) for entry in documented}
    hints = hints_of(cls)
    for name, default in _defaults(cls):
        section = dataclass_of(hints[name]) if is_section else None
        if section:
            yield Key(name, meanings[name], "section", "", section)
        else:
            yield Key(name, meanings[name], in_words(hints[name]), _yaml(default))


def _defaults(cls: type) -> Iterator[tuple[str, Any]]:
    if not dataclasses.is_dataclass(cls):
        for name, parameter in inspect.signature(cls).parameters.items():
            yield name, parameter.default
        return
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            yield field.name, field.default
        elif field.default_factory is not dataclasses.MISSING:
            yield field.name, field.default_factory()
        else:
            yield field.name, inspect.Parameter.empty


def _yaml(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if dataclasses.is_dataclass(value):
        return "its own defaults"
    return value if isinstance(value, str) else json.dumps(value)


SOURCE_ARGS = "model.config.value.source_args"


def settings_of_sources() -> Iterator[tuple[str, type]]:
    """(name, dataclass of its settings) of each value source of the package that has some."""
    return (
        (name, cls.args_class) for name, cls in named_sources().items()
        if dataclasses.fields(cls.args_class)
    )  # fmt: skip


def listing(width: int) -> str:
    """All keys of a recipe as options, for a terminal of that many columns."""
    lines = ["usage: bov fit --config R.yaml [--KEY VALUE ...]", ""]

    def add(cls: type, path: str) -> None:
        for key in keys_of(cls):
            here = f"{path}.{key.name}".lstrip(".")
            more = "" if key.section else f"  {key.words}; {key.default} if not given"
            lines.append(f"--{here}{more}")
            indent = " " * 6
            lines.extend(
                textwrap.wrap(
                    key.meaning, max(width, 40), initial_indent=indent, subsequent_indent=indent
                )
            )
            if key.section:
                add(key.section, here)
            if here == SOURCE_ARGS:
                for source, args_class in settings_of_sources():
                    lines.append(f"{' ' * 6}of {source}:")
                    add(args_class, here)

    add(Recipe, "")
    return "\n".join(lines)
