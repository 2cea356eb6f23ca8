"""What the annotations of keys say: sections, texts, paths, numbers with a range."""

import dataclasses
import inspect
import os
import re
import typing
from importlib import import_module
from types import NoneType, UnionType
from typing import Annotated, Any, Literal

from bov_lightning.kinds import Range, is_path, range_of

TRAINER: dict[str, Any] = {
    "num_nodes": Annotated[int, Range(1, 100_000)],
    "log_every_n_steps": Annotated[int | None, Range(1, 10**9)],
    "gradient_clip_val": Annotated[float | None, Range(0, 10**9)],
}
"""Numbers of the trainer section, whose keys are Lightning's, not ours."""

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
"""Numbers that YAML 1.1 takes for text, such as 1e-3, are meant as numbers."""


def hints_of(cls: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields or of a class's arguments; none where unreadable."""
    try:
        if dataclasses.is_dataclass(cls):
            return typing.get_type_hints(cls, include_extras=True)
        known = inspect.signature(cls).parameters
        found = typing.get_type_hints(cls.__init__, include_extras=True)
    except (NameError, TypeError, ValueError, AttributeError):
        return {}
    return {name: annotation for name, annotation in found.items() if name in known}


def options_of(annotation: Any) -> tuple[Any, ...]:
    """The types that a value may have, ``Annotated`` taken off."""
    bare = annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation
    if typing.get_origin(bare) in (typing.Union, UnionType):
        return tuple(x for option in typing.get_args(bare) for x in options_of(option))
    return (bare,)


def dataclass_of(annotation: Any) -> type | None:
    """The dataclass among the types of an annotation."""
    found = (x for x in options_of(annotation) if dataclasses.is_dataclass(x))
    return next(found, None)


def class_of(annotation: Any) -> type | None:
    """The one class of ours or of somebody else's that a value has to be; None for other types."""
    options = [x for x in options_of(annotation) if x is not NoneType]
    if len(options) != 1 or not isinstance(options[0], type) or options[0].__module__ == "builtins":
        return None
    return None if dict in options[0].__mro__ or _is_path_type(options[0]) else options[0]


def is_optional(annotation: Any) -> bool:
    """Whether null is a value."""
    return NoneType in options_of(annotation)


def _is_path_type(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, os.PathLike)


def is_local_path(annotation: Any) -> bool:
    """Whether a text is a path: by its mark, or since a ``Path`` may stand for it."""
    return is_path(annotation) or any(map(_is_path_type, options_of(annotation)))


def is_text(annotation: Any) -> bool:
    """Whether nothing but text (or null) may stand there, free or one of some words."""
    options = [x for x in options_of(annotation) if x is not NoneType]
    words = [
        word
        for option in options
        for word in (typing.get_args(option) if typing.get_origin(option) is Literal else [option])
    ]
    return bool(words) and all(
        word is str or isinstance(word, str) or _is_path_type(word) for word in words
    )


def is_free_text(annotation: Any) -> bool:
    """Whether any text may stand there, and nothing else."""
    return is_text(annotation) and (
        str in options_of(annotation) or any(map(_is_path_type, options_of(annotation)))
    )


def element_of(annotation: Any) -> Any:
    """The annotation of a list's elements, with the marks of the list; None where it is no list."""
    for option in options_of(annotation):
        if typing.get_origin(option) in (list, tuple) and typing.get_args(option):
            element = typing.get_args(option)[0]
            marks = getattr(annotation, "__metadata__", ())
            return Annotated[(element, *marks)] if marks else element
    return None


def is_number(annotation: Any) -> bool:
    """Whether a number may stand there, in a list too."""
    element = element_of(annotation)
    return bool({int, float} & set(options_of(annotation))) or (
        element is not None and is_number(element)
    )


def in_words(annotation: Any) -> str:
    """An annotation as a reader of YAML understands it, with the range of a number."""
    options, found = options_of(annotation), range_of(annotation)
    # Null last: what a key means comes first.
    parts = [_word(x) for x in options if x is not NoneType]
    if is_path(annotation):
        parts = [part.replace("text", "path") for part in parts]
    if found is not None:
        parts[-1] += f" {found}"
    return " or ".join([*parts, *(["null"] if NoneType in options else [])])


def needed(annotation: Any) -> str:
    """`in_words` in a sentence: an integer, a list of text."""
    words = in_words(annotation)
    words = re.sub(r"(^| or )(integer)", r"\1an \2", words)
    return re.sub(r"(^| or )(number|list|mapping|class_path)", r"\1a \2", words)


def _word(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return " or ".join(str(word) for word in typing.get_args(option))
    names = {bool: "true or false", str: "text", int: "integer", float: "number", Any: "anything"}
    if option in names:
        return names[option]
    if typing.get_origin(option) in (list, tuple):
        return f"list of {in_words(typing.get_args(option)[0])}"
    if dataclasses.is_dataclass(option):
        *first, last = [field.name for field in dataclasses.fields(option)]
        return f"mapping of {', '.join(first)} and {last}" if first else f"mapping of {last}"
    if option is dict or typing.get_origin(option) is dict:
        return "mapping"
    return f"class_path of a {getattr(option, '__name__', option)}"


def class_at(path: Any) -> Any:
    """The class of that path; None where it cannot be imported, which others report."""
    module, _, name = str(path).rpartition(".")
    try:
        return getattr(import_module(module), name)
    except Exception:
        # Importing runs the user's own module: whatever it raises.
        return None


def annotation_at(key: str, settings: dict, hints: dict[str, Any]) -> Any:
    """The annotation of a dotted key; ``Any`` where it is not known.

    Args:
        key: below the section that ``hints`` are of.
        settings: what the section holds: the classes that it names decide what their arguments are.
        hints: of the section's keys.
    """
    name, _, rest = key.partition(".")
    name = name.removesuffix("+")
    annotation = hints.get(name, Any)
    below = settings.get(name) if isinstance(settings, dict) else None
    below = below if isinstance(below, dict) else {}
    if not rest:
        return annotation
    if section := dataclass_of(annotation):
        return annotation_at(rest, below, hints_of(section))
    if rest == "class_path":
        return str
    if rest.startswith("init_args."):
        arguments = hints_of(class_at(below.get("class_path")))
        return annotation_at(rest.partition(".")[2], below.get("init_args") or {}, arguments)
    if name == "trainer":
        return annotation_at(rest, below, TRAINER)
    return Any


def number_in(value: Any) -> int | float | None:
    """The number that a value is or spells out; None where it is none."""
    if isinstance(value, str):
        text = value.strip()
        if not NUMBER.fullmatch(text):
            return None
        return int(text) if re.fullmatch(r"[-+]?\d{1,4000}", text) else float(text)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
