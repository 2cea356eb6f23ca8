"""From plain data to typed objects; every mistake is one line."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bov_lightning.errors import UserError
from bov_lightning.kinds import typed
from bov_lightning.recipe.annotations import dataclass_of, hints_of, is_optional


def build(cls: type, data: dict, origin: str, path: str = "") -> Any:
    """A config dataclass from plain data whose keys are known; types are checked.

    Every problem is a `UserError` that names ``origin`` and the key.
    """
    try:
        return _section(cls, data, path)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _section(cls: type, data: dict, path: str) -> Any:
    hints, values = hints_of(cls), {}
    for name, value in data.items():
        here = f"{path}.{name}".lstrip(".")
        section = dataclass_of(hints[name])
        if section and isinstance(value, dict):
            values[name] = _section(section, value, here)
        elif not section or is_optional(hints[name]) or value is not None:
            values[name] = typed(value, hints[name], here)
    return cls(**values)


def one_line(error: Exception) -> str:
    """The gist of one of jsonargparse's multi-line messages."""
    if isinstance(error.__cause__, UserError):
        return str(error.__cause__)
    return _gist(str(error))


def _gist(text: str) -> str:
    problem = re.search(
        r"Problem with given class_path '([^']+)':\n(.*?)(?=\n\s*- (?:Not a|Expected|Problem)|\Z)",
        text,
        re.DOTALL,
    )
    key = re.search(r'key "([^"]+)"', text)
    if problem:
        return f"{key[1] + ': ' if key else ''}{problem[1]}: {_gist(problem[2])}"
    expected = re.findall(r"Expected an? (.+?)(?:\. Got|\n|$)", text)
    value = re.search(r"(?:Given value|Got value): (.*)", text)
    if not (key and expected and value):
        return " ".join(text.split())
    options = [
        re.sub(r"typing\.Literal\[(.+)\]", _words, re.sub(r"<class '(.+)'>", r"\1", option))
        for option in expected
    ]
    return f"{key[1]} is {value[1]!r}, but must be {' or '.join(options)}"


def _words(literal: re.Match) -> str:
    return literal[1].replace("'", "").replace(", ", " or ")


@contextmanager
def user_errors(origin: str) -> Iterator[None]:
    """Turns whatever building somebody's classes raises into a `UserError`.

    A recipe decides which classes are built and of what, so it is what has to change. A full disk
    stays what it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain: list[BaseException] = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        for cause in chain:
            if isinstance(cause, UserError):
                raise UserError(f"{origin}: {cause}") from None
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
        if type(error).__module__.startswith(("jsonargparse", "argparse")):
            raise UserError(f"{origin}: {one_line(error)}") from None
        raise UserError(f"{origin}: {_said(error, chain[-1])}") from error


def _said(error: Exception, first: BaseException) -> str:
    """What a class of somebody else's says; the name of the error where that says little.

    Args:
        error: what was raised.
        first: what it came of.
    """
    where = ""
    if str(error).startswith("Does not validate"):
        # jsonargparse tries all types that an argument may have, and reports them all.
        named = re.search(r"class_path='([^']+)'", str(error))
        error, where = first, f"{named[1]}: " if named else ""
    text, name = " ".join(str(error).split())[:400], type(error).__name__
    if " " in text and name.startswith(("Misconfiguration", "Value", "Type")):
        return where + text
    return f"{where}{name}: {text}".rstrip(": ")
