"""Options that several commands share, and those that a dataclass describes."""

import argparse
import difflib
import re
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from bov_lightning.errors import UserError
from bov_lightning.kinds import Range, home, range_of


class Parser(argparse.ArgumentParser):
    """Reports mistakes as `UserError`, in one line.

    Options are held to what recipes are: numbers to their ranges (`number`), ``~`` is the home at
    the start of a path (`path`), and an empty text is a variable that is not set.
    """

    def __init__(self, *arguments: Any, takes_keys: bool = False, **options: Any):
        """``takes_keys``: options that the parser does not know are keys of a recipe."""
        super().__init__(*arguments, **options)
        self.takes_keys = takes_keys

    def error(self, message: str) -> None:
        """Raises it."""
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, with the checks."""
        known, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            self._check(action, getattr(known, action.dest, None))
        options = [x.partition("=")[0] for x in rest if re.match("--[^0-9]", x)]
        if options and not self.takes_keys:
            self._refuse(options[0], [])
        return known, rest

    def check_keys(self, keys: list[str]) -> None:
        """Refuses what is neither an option of the command nor a key of a recipe."""
        from bov_lightning.recipe.keys import known_keys
        from bov_lightning.recipe.sections import Recipe

        known = known_keys(Recipe)
        for key in keys:
            if "." not in key and key.removesuffix("+") not in known:
                self._refuse(f"--{key}", [f"--{name}" for name in known])

    def _refuse(self, option: str, keys: list[str]) -> None:
        own = [name for action in self._actions for name in action.option_strings]
        close = difflib.get_close_matches(option, own, n=1) or difflib.get_close_matches(
            option, [*own, *keys], n=1, cutoff=0.4
        )
        same = [key for key in keys if key.rpartition(".")[2] == option[2:]]
        guess = (same or close)[:1]
        hint = f": did you mean {guess[0]}?" if guess else ""
        lists = " and bov fit --keys" if self.takes_keys else ""
        raise UserError(
            f"{self.prog}: unknown option {option}{hint} (see {self.prog} --help{lists})"
        )

    def _check(self, action: argparse.Action, value: Any) -> None:
        name = action.option_strings[0] if action.option_strings else action.metavar or action.dest
        for item in value if isinstance(value, list) else [value]:
            if (
                isinstance(item, str)
                and not item.strip()
                and not getattr(action, "may_be_empty", False)
            ):
                raise UserError(f"{name} is empty (a variable that is not set?): give it a value")
            found: Range | None = getattr(action, "within", None)
            if found and isinstance(item, int | float) and (wrong := found.refusal(item)):
                raise UserError(f"{name} {wrong}")


def path(text: str) -> Path:
    """The type of options that are paths."""
    return Path(path_text(text))


def path_text(text: str) -> str:
    """The type of options that are paths, for commands that show them as they were given."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty (a variable that is not set?)")
    try:
        return home(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def number(parser: Any, name: str, kind: type, within: Range, **options: Any) -> None:
    """Adds an option that is a number in a range, which its help tells."""
    options["help"] = f"{options['help']}; {within}".replace("%", "%%")
    parser.add_argument(name, type=kind, **options).within = within


def recipe_parser(command: str, description: str) -> Parser:
    """A parser of a command that takes a recipe; what it does not know are the recipe's keys."""
    parser = Parser(
        prog=f"bov {command}",
        description=description,
        epilog="Every key of the recipe is an option too, for example --run.name NAME. "
        "bov fit --keys lists them all with their meaning.",
        allow_abbrev=False,
        takes_keys=True,
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


def parse_with_keys(parser: Parser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and those that are keys of the recipe."""
    from bov_lightning.recipe.overlays import split_options

    known, options = parser.parse_known_args(arguments)
    parser.check_keys([key for key, _ in split_options(options)])
    return known, options


def read_given(known: argparse.Namespace, options: list[str]):
    """The `Given` recipe of a `recipe_parser`'s options."""
    from bov_lightning.recipe import given

    return given.read(known.config, options, data=known.data, val_data=known.val_data)


def add_options(parser: Any, cls: type) -> None:
    """An option for each field of a config dataclass, explained by the field's docstring.

    ``int``, ``float`` and ``str``, each also optional, and lists and tuples of ``str``, whose
    option may be repeated. Numbers are held to the ranges that their annotations give.
    """
    from docstring_parser import parse_from_object

    meanings = {p.arg_name: p.description for p in parse_from_object(cls).params}
    hints, marked = get_type_hints(cls), get_type_hints(cls, include_extras=True)
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
        action = parser.add_argument(name, default=default, help=meaning.replace("%", "%%"), **how)
        if within := range_of(marked[field.name]):
            action.within = within


def read_options(known: argparse.Namespace, cls: type):
    """The dataclass that `add_options` has asked for; an impossible one is a `UserError`."""
    values = {field.name: getattr(known, field.name) for field in fields(cls)}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
