"""The DataModule of a recipe: its class, checked, and what the other sections fill in."""

import copy
import dataclasses
import inspect
import operator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from bov_lightning.errors import UserError
from bov_lightning.kinds import needed
from bov_lightning.recipe.annotations import class_of, hints_of
from bov_lightning.recipe.building import user_errors
from bov_lightning.recipe.given import Given
from bov_lightning.recipe.keys import unknown_key
from bov_lightning.recipe.settling import settle

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

DATA_LINKS = {
    "data.init_args.sequence_len": "model.config.sequence_len",
    "data.init_args.micro": "batch.micro",
    "data.init_args.seed": "seed",
    "data.init_args.validation_tokens": "validation.tokens",
}
"""Arguments of every DataModule, and the keys of the recipe that fill them in."""


def check_class(section: dict, where: str, origin: str, base: type | None = None) -> None:
    """Refuses a class that is not there or none of ``base``, and arguments that it does not have.

    Args:
        section: ``class_path`` and ``init_args``.
        where: its key.
        origin: what errors call the recipe.
        base: what the class must be derived from, where that is known.
    """
    path, arguments = section.get("class_path"), section.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise UserError(f"{origin}: {where}.init_args is {arguments!r}, but must be a mapping")
    module_name, _, class_name = str(path).rpartition(".")
    try:
        found = getattr(import_module(module_name), class_name)
        known = inspect.signature(found).parameters
    except (ImportError, ValueError, AttributeError, TypeError):
        raise UserError(f"{origin}: {where}.class_path {path} cannot be imported") from None
    if base is not None and not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{origin}: {where}.class_path {path} is no {base.__name__}")
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    hints = hints_of(found)
    for name, value in arguments.items():
        here = f"{where}.init_args.{name}"
        if name not in known and not takes_any:
            options = [f"{where}.init_args.{option}" for option in known]
            raise unknown_key(here, options, origin)
        inner = class_of(hints.get(name))
        if isinstance(value, dict) and "class_path" in value:
            check_class(value, here, origin, inner)
        elif isinstance(value, dict) and dataclasses.is_dataclass(inner):
            fields = [f"{here}.{field.name}" for field in dataclasses.fields(inner)]
            for field in value:
                if f"{here}.{field}" not in fields:
                    raise unknown_key(f"{here}.{field}", fields, origin)
        elif inner is not None and value is not None and not isinstance(value, dict | str):
            raise UserError(f"{origin}: {here} is {value!r}, but must be {needed(hints[name])}")


def data_section(given: Given) -> dict[str, Any]:
    """The recipe's data section, settled; a missing one, or unknown keys, is a `UserError`."""
    if not given.plain.get("data"):
        raise given.error("the recipe has no data section")
    check_class(given.plain["data"], "data", given.origin)
    if given.stored:
        return given.plain["data"]
    try:
        return settle(given.plain["data"], Any, "data")
    except UserError as error:
        raise given.error(str(error)) from None


def build_data(given: Given) -> "LightningDataModule":
    """The recipe's DataModule alone, with what the other sections fill in."""
    # Lightning takes seconds, which commands that build no data need not pay.
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule

    section = copy.deepcopy(data_section(given))
    check_class(section, "data", given.origin, LightningDataModule)
    filled = {
        target.rpartition(".")[2]: operator.attrgetter(source)(given.recipe)
        for target, source in DATA_LINKS.items()
    }
    arguments = {**(section.get("init_args") or {}), **filled}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    with user_errors(given.origin):
        parsed = parser.parse_object({"data": {**section, "init_args": arguments}})
        return parser.instantiate(parsed).data
