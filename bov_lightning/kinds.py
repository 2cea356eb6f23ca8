"""What an annotation says of a value beyond its type: the range of a number, which text is a path.

    warmup_steps: Annotated[int, Range(0, 10**9)] = 40
    root: Annotated[str, PATH] = "runs"

Recipes, the arguments of classes that they name, and the options of commands are held to it.
"""

import math
import os
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

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
