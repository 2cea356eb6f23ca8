"""Options that several commands share, and those that a dataclass describes."""

import argparse
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from bov_lightning.errors import UserError


class Parser(argparse.ArgumentParser):
    """Reports mistakes as `UserError`, in one line."""

    def error(self, message: str) -> None:
        """Raises it."""
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def recipe_parser(command: str, description: str) -> Parser:
    """A parser of a command that takes a recipe; what it does not know are the recipe's keys."""
    parser = Parser(
        prog=f"bov {command}",
        description=description,
        epilog="Every key of the recipe is an option too, for example --run.name NAME. "
        "bov fit --keys lists them all with their meaning.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="R.yaml",
        help="a recipe, or an overlay on the ones before it",
    )  # fmt: skip
    for name, purpose in (("--data", "train"), ("--val-data", "validate")):
        parser.add_argument(
            name, action="append", default=[], metavar="FILES",
            help=f"text files to {purpose} on, instead of the recipe's: a path or a pattern",
        )  # fmt: skip
    return parser


def read_given(known: argparse.Namespace, options: list[str]):
    """The `Given` recipe of a `recipe_parser`'s options."""
    from bov_lightning.recipe import given

    return given.read(known.config, options, data=known.data, val_data=known.val_data)


def add_options(parser: argparse._ActionsContainer, cls: type) -> None:
    """An option for each field of a config dataclass, explained by the field's docstring.

    ``int``, ``float`` and ``str``, each also optional, and lists and tuples of ``str``, whose
    option may be repeated.
    """
    from docstring_parser import parse_from_object

    meanings = {p.arg_name: p.description for p in parse_from_object(cls).params}
    hints = get_type_hints(cls)
    for field in fields(cls):
        kinds = [kind for kind in get_args(hints[field.name]) if kind is not NoneType]
        kind = kinds[0] if kinds and get_origin(hints[field.name]) not in (list, tuple) else None
        how: dict[str, Any] = {"type": kind or hints[field.name]}
        default = field.default
        if get_origin(hints[field.name]) in (list, tuple):
            how, default = {"action": "append"}, []
        meaning = " ".join((meanings.get(field.name) or "").rstrip(".").split())
        if meaning[1:2].islower():
            meaning = meaning[0].lower() + meaning[1:]
        if default not in (None, MISSING, []) and "not given" not in meaning:
            meaning += f" ({default} if not given)"
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, default=default, help=meaning.replace("%", "%%"), **how)


def read_options(known: argparse.Namespace, cls: type):
    """The dataclass that `add_options` has asked for; an impossible one is a `UserError`."""
    values = {field.name: getattr(known, field.name) for field in fields(cls)}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
