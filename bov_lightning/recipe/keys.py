"""Which keys a recipe has, and which one was probably meant."""

import dataclasses
import difflib
import typing
from typing import Any

from bov_lightning.errors import UserError
from bov_lightning.kinds import options_of
from bov_lightning.recipe.annotations import dataclass_of, is_optional
from bov_lightning.recipe.sections import Recipe


def known_keys(cls: type, path: str = "") -> list[str]:
    """All dotted keys of a config dataclass."""
    keys = []
    for name, annotation in typing.get_type_hints(cls).items():
        here = f"{path}.{name}" if path else name
        nested = dataclass_of(annotation)
        keys += [here, *(known_keys(nested, here) if nested else [])]
    return keys


def defaults(cls: type = Recipe, path: str = "") -> dict[str, Any]:
    """The default of every dotted key that has one, for recipes of before the key was there.

    Sections that are left out by default, such as the budget, and what lies below ``data`` and
    ``trainer`` have none.
    """
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        here = f"{path}.{field.name}" if path else field.name
        nested = dataclass_of(hints[field.name])
        if nested is hints[field.name]:
            found |= defaults(nested, here)
        elif nested is None and field.default is not dataclasses.MISSING:
            found[here] = field.default
        elif nested is None and hints[field.name] == list[str]:
            found[here] = []
    return found


def nearest(key: str, known: list[str]) -> str | None:
    """The known dotted key that was probably meant."""
    section, _, name = key.rpartition(".")
    same_section = [k for k in known if k.rpartition(".")[0] == section]
    same_name = [k for k in known if k.rpartition(".")[2] == name]
    for candidates, cutoff in ((same_section, 0.7), (same_name, 0.0), (known, 0.5)):
        if close := difflib.get_close_matches(key, candidates, n=1, cutoff=cutoff):
            return close[0]
    return None


HOW_TO_LIST = "bov fit --keys lists all"


def unknown_key(key: str, known: list[str], origin: str) -> UserError:
    """The error for a key that does not exist."""
    if guess := nearest(key, known):
        hint = f"did you mean {guess}?"
    elif any_close := difflib.get_close_matches(key, known, n=1, cutoff=0.0):
        hint = f"the nearest is {any_close[0]}"
    else:
        hint = "there are none here"
    return UserError(f"{origin}: unknown key {key}: {hint} ({HOW_TO_LIST})")


def check_keys(data: dict, origin: str, cls: type = Recipe, path: str = "") -> None:
    """Refuses keys that no section has, naming the nearest; values are checked elsewhere."""
    hints = typing.get_type_hints(cls)
    for key, value in data.items():
        name = str(key).removesuffix("+")
        here = f"{path}.{name}" if path else name
        if not isinstance(key, str) or name not in hints:
            raise unknown_key(here, known_keys(Recipe), origin)
        nested = dataclass_of(hints[name])
        mapping = any(typing.get_origin(x) is dict for x in options_of(hints[name]))
        if nested is None and not mapping:
            continue
        if value is None and not is_optional(hints[name]):
            raise UserError(f"{origin}: {here} is empty: give it keys or leave it out")
        if isinstance(value, dict) and nested is not None:
            check_keys(value, origin, nested, here)
        elif value is not None and not isinstance(value, dict):
            raise UserError(f"{origin}: {here} is {value!r}, but must be a section with keys")
