"""The `bov` command."""

from bov_lightning.cli.commands import COMMANDS, USAGE, entry_point, main

__all__ = ["COMMANDS", "USAGE", "entry_point", "main"]
