"""What the annotations of keys say: sections, texts, paths, numbers with a range."""

import dataclasses
import inspect
import os
import typing
from importlib import import_module
from types import NoneType
from typing import Annotated, Any, Literal

from bov_lightning.kinds import Range, is_path, options_of

TRAINER: dict[str, Any] = {
    "num_nodes": Annotated[int, Range(1, 100_000)],
    "log_every_n_steps": Annotated[int | None, Range(1, 10**9)],
    "gradient_clip_val": Annotated[float | None, Range(0, 10**9)],
}
"""Numbers of the trainer section, whose keys are Lightning's, not ours."""


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
