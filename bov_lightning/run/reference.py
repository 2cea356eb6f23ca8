"""`run.reference`: another run, beside whose bits per byte those of this one are shown."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bov_lightning.recipe.overlays import read_yaml
from bov_lightning.run.directory import RunDirectory


@dataclass(frozen=True)
class Comparison:
    """How a run stands against its reference at the same number of tokens."""

    name: str
    """Of the reference."""
    difference: float | None
    """val_bpb minus the reference's; None: there is none, and ``reason`` says why."""
    reason: str = ""
    is_final: bool = False
    """Whether the reason stays, however long both train."""

    def __str__(self) -> str:
        if self.difference is None:
            return f"no difference to {self.name}: {self.reason}"
        return f"{self.difference:+.4f} to {self.name}"


def find_reference(reference: str, root: str) -> Path:
    """The run of that name in the folder of all runs; failing that, the path."""
    named = Path(root) / reference
    return Path(reference) if Path(reference).is_dir() and not named.is_dir() else named


class Reference:
    """A run that may still be training: its files are read anew whenever they are asked for."""

    def __init__(self, directory: Path, data: dict[str, str], validation_tokens: int | None):
        """
        Args:
            directory: the reference.
            data: the DataModule's fingerprint in this run.
            validation_tokens: validation.tokens of this run.
        """
        self.directory, self.data, self.validation_tokens = directory, data, validation_tokens
        self.run = RunDirectory(directory)

    def compare(self, tokens: int, val_bpb: float) -> Comparison:
        """``val_bpb``, measured after so many training tokens, against the reference's.

        Between two validations of the reference its val_bpb is interpolated linearly.
        """
        name = self.directory.name
        try:
            if reason := self._other_text():
                return Comparison(name, None, reason, is_final=True)
            points = self._points()
        except (ValueError, KeyError, TypeError) as error:
            return Comparison(name, None, f"{self.directory} cannot be read ({error})")
        if not points:
            return Comparison(name, None, "it has no val_bpb yet")
        x, y = zip(*points, strict=True)
        if not x[0] <= tokens <= x[-1]:
            where = f"its first is at {x[0]:,.0f}" if tokens < x[0] else f"it is at {x[-1]:,.0f}"
            return Comparison(name, None, f"{where} tokens, this run at {tokens:,}")
        return Comparison(name, val_bpb - float(np.interp(tokens, x, y)))

    def _other_text(self) -> str:
        """What of the text behind its val_bpb differs; "" if nothing does."""
        theirs: dict[str, Any] = self.run.facts()["data"]
        for key, what in (("tokenizer", "tokenizer"), ("val_rows", "validation set")):
            if theirs[key] != self.data[key]:
                return f"it has another {what}"
        validation = read_yaml(self.run.config).get("validation") or {}
        if validation.get("tokens") != self.validation_tokens:
            return f"its validation.tokens is {validation.get('tokens')}"
        return ""

    def _points(self) -> list[tuple[float, float]]:
        """(training tokens, val_bpb) of its validations, in order."""
        found = [
            (float(row["tokens"]), float(row["val_bpb"]))
            for row in self.run.metrics()
            if "tokens" in row and "val_bpb" in row
        ]
        return sorted(found)
