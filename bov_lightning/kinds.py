"""What an annotation says of a value beyond its type: the range of a number, which text is a path.

    warmup_steps: Annotated[int, Range(0, 10**9)] = 40
    root: Annotated[str, PATH] = "runs"

Recipes, the arguments of classes that they name, and the options of commands are held to it.
"""

import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, get_type_hints

from bov_lightning.errors import UserError

ENDLESS = 2**40
"""Upper ends from here on only keep numbers usable."""


@dataclass(frozen=True)
class Range:
    """The numbers that a key may have; never NaN, nor infinity."""

    least: float | None = None
    """The smallest one."""
    most: float | None = None
    """The largest one."""
    above: float | None = None
    """The end below, where that does not belong to it."""
    soft: bool = False
    """Whether runs that were stored before there was a range may lie outside, and still load."""

    def __str__(self) -> str:
        # An end that only keeps numbers usable is news to those alone who are beyond it.
        most = None if self.most is None or self.most >= ENDLESS else self.most
        if self.least is not None and most is not None:
            return f"from {self.least:,} to {most:,}"
        parts = (("above", self.above), ("at least", self.least), ("at most", most))
        return ", ".join(f"{word} {end:,}" for word, end in parts if end is not None)

    def starts_below(self, value: float) -> bool:
        """Whether ``value`` is not too small; NaN is."""
        return value > self.above if self.least is None else value >= self.least

    def refusal(self, value: float) -> str | None:
        """What is wrong with a number, to stand after its key; None where nothing is."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"is {value}: a finite number, {self}"
        if not self.starts_below(value):
            return f"is {value}: {self}"
        if self.most is None or value <= self.most:
            return None
        # Thousands of digits help nobody.
        shown = f"is {value}" if value < 10**30 else "is too large"
        return f"{shown}: {self}" if self.most < ENDLESS else f"{shown}: at most {self.most:,}"


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
"""Numbers that YAML 1.1 takes for text, such as 1e-3, are meant as numbers."""

PATH = "a path"
"""Marks text that is a path (or a pattern of paths, or an address): ~ is the home there."""

SEED = Range(0, 2**32 - 1, soft=True)
"""Of seeds, as NumPy takes them."""

COUNT = Range(1, ENDLESS)
"""Of what there are some of: at least one."""


def home(text: str, name: str = "") -> str:
    """The path with ``~`` and ``~user`` at its start replaced by the home; ``$NAME`` stays.

    Args:
        text: as the user gave it; ``./~x`` is a file called ``~x``.
        name: what errors call it.

    Raises:
        UserError: nobody of that name.
    """
    if not text.startswith("~"):
        return text
    found = os.path.expanduser(text)
    if found.startswith("~"):
        user = text.partition("/")[0]
        raise UserError(
            f"{name} {text}: there is no home {user}; for a file of that name write ./{text}"
            .lstrip()
        )  # fmt: skip
    return found


def range_of(annotation: Any) -> Range | None:
    """The range in an ``Annotated`` type; None where it has none."""
    marks = getattr(annotation, "__metadata__", ())
    return next((mark for mark in marks if isinstance(mark, Range)), None)


def is_path(annotation: Any) -> bool:
    """Whether an ``Annotated`` type is marked as a path."""
    return PATH in getattr(annotation, "__metadata__", ())


def check_least(section: Any, name: str) -> None:
    """Refuses a dataclass whose numbers are below their ranges, but for soft ones.

    The other end, and soft ranges, bind only what a user gives (`recipe.settling`), so that what
    earlier versions stored still loads.

    Raises:
        UserError: the first such number, called ``name.field``.
    """
    hints = get_type_hints(type(section), include_extras=True)
    for field in fields(section):
        value, found = getattr(section, field.name), range_of(hints[field.name])
        if found is None or found.soft or not isinstance(value, int | float):
            continue
        if not found.starts_below(value):
            raise UserError(f"{name}.{field.name} is {value}: {found}")


def number_in(value: Any) -> int | float | None:
    """The number that a value is or spells out; None where it is none."""
    if isinstance(value, str):
        text = value.strip()
        if not NUMBER.fullmatch(text):
            return None
        return int(text) if re.fullmatch(r"[-+]?\d{1,4000}", text) else float(text)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def options_of(annotation: Any) -> tuple[Any, ...]:
    """The types that a value may have, ``Annotated`` taken off."""
    bare = annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation
    if typing.get_origin(bare) in (typing.Union, UnionType):
        return tuple(x for option in typing.get_args(bare) for x in options_of(option))
    return (bare,)


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


class _MisfitError(Exception):
    """A value is of another type."""


def typed(value: Any, annotation: Any, where: str) -> Any:
    """The value as one of the types of an annotation, called ``where``; else a `UserError`."""
    for option in options_of(annotation):
        try:
            return _as(value, option, where)
        except _MisfitError:
            pass
    raise UserError(f"{where} is {value!r}, but must be {needed(annotation)}")


def _as(value: Any, option: Any, where: str) -> Any:
    """The value as one of the types that an annotation has."""
    kind = typing.get_origin(option) or option
    if kind is Any:
        return value
    if kind is Literal:
        if any(type(word) is type(value) and word == value for word in typing.get_args(option)):
            return value
    elif kind is NoneType:
        if value is None:
            return None
    elif kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    elif kind is int and isinstance(found := number_in(value), int):
        return found
    elif kind is float and (found := number_in(value)) is not None:
        try:
            return float(found)
        except OverflowError:
            raise UserError(f"{where} is a number without meaning: it is too large") from None
    elif kind in (list, tuple) and isinstance(value, list):
        element = (*typing.get_args(option), Any)[0]
        return kind(typed(item, element, f"{where}[{i}]") for i, item in enumerate(value))
    elif kind in (str, dict) and isinstance(value, kind):
        return value
    raise _MisfitError


def read_settings(cls: type, given: Mapping[str, Any], where: str) -> Any:
    """A dataclass of settings from plain data.

    Args:
        cls: the dataclass; its annotations say which types and ranges its fields have.
        given: value by field; one that is not given has its default.
        where: what errors call it; ``where.field`` in full.

    Raises:
        UserError: a setting that does not exist, with the nearest, or one that is missing, of
            another type or outside of its range.
    """
    hints, values = get_type_hints(cls, include_extras=True), {}
    for name, value in given.items():
        here = f"{where}.{name}"
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.0)
            told = f"did you mean {where}.{close[0]}?" if close else "there are no settings here"
            raise UserError(f"unknown key {here}: {told}")
        values[name] = found = typed(value, hints[name], here)
        within = range_of(hints[name])
        for number in found if isinstance(found, list) else [found]:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if within is not None and is_number and (wrong := within.refusal(number)):
                raise UserError(f"{here} {wrong}")
    for field in fields(cls):
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if field.name not in values and not optional:
            raise UserError(
                f"{where}.{field.name} is not set: it needs {needed(hints[field.name])}"
            )
    return cls(**values)
