"""From plain data to typed objects; every mistake is one line."""

import copy
import re
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bov_lightning.errors import UserError

if TYPE_CHECKING:
    pass


def build(cls: type, data: dict, origin: str, path: str = "") -> Any:
    """A config dataclass from plain data whose keys are known; types are checked.

    Every problem is a `UserError` that names ``origin`` and the key.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    # A class named below `data` is built by LightningCLI, which knows what it may be; not here.
    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, path or None)
    try:
        # A copy: jsonargparse turns parts of what it is given into its own types.
        given = copy.deepcopy(data)
        parsed = parser.parse_object({path: given} if path else given)
        built = parser.instantiate(parsed)
        return built[path] if path else cls(**vars(built))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{origin}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """The gist of one of jsonargparse's multi-line messages."""
    if isinstance(error.__cause__, UserError):
        return str(error.__cause__)
    text = str(error)
    key = re.search(r'key "([^"]+)"', text)
    expected = re.findall(r"Expected an? (.+?)(?:\. Got|\n|$)", text)
    value = re.search(r"(?:Given value|Got value): (.*)", text)
    if not (key and expected and value):
        return " ".join(text.split())
    options = [re.sub(r"<class '(.+)'>|typing\.Literal", r"\1", option) for option in expected]
    return f"{key[1]} is {value[1]!r}, but must be {' or '.join(options)}"


@contextmanager
def user_errors(origin: str) -> Iterator[None]:
    """Turns what jsonargparse makes of a wrong value into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise UserError(f"{origin}: {cause}") from None
            cause = cause.__cause__ or cause.__context__
        if type(error).__module__.startswith(("jsonargparse", "argparse")):
            raise UserError(f"{origin}: {one_line(error)}") from None
        raise
