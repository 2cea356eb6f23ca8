"""What a ladder has measured so far: runs.csv, a line per run, and speed.csv.

Small enough to be committed, and all that the ladder's report and its continuation need: run
directories need not be there any more.
"""

import csv
import fcntl
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from bov_lightning.errors import UserError
from bov_lightning.files import write_file
from bov_lightning.recipe.ladder import Ladder

RUNS, SPEED = "runs.csv", "speed.csv"
SAME = ("text", "tokenizer", "val_rows", "val_tokens", "device", "precision")
"""What all lines of a file must have in common."""


@dataclass(frozen=True)
class Result:
    """A run that has ended."""

    run: str
    """Its name."""
    kind: str
    """tuning, check, or rung: what the multipliers come from."""
    rung: str
    arm: str
    seed: int
    rates: float
    """What all learning rates were multiplied by."""
    table_rates: float
    """What table_lr was multiplied by besides."""
    val_bpb: float
    """Bits per byte on held-out text at the end; NaN: it diverged."""
    train_bpb: float
    """Bits per byte, at the end, on as much of the text that it was trained on."""
    steps: int
    tokens: int
    epochs: float
    """Passes over the text."""
    flops: float
    parameters: int
    """Live ones."""
    tables: int
    """Those of them in value tables."""
    train_seconds: float
    """Of training alone."""
    seconds: float
    """Of the whole run, the last time that it was started."""
    device: str
    """cpu or cuda."""
    precision: str
    text: str
    """Fingerprint."""
    tokenizer: str
    """Fingerprint."""
    val_rows: str
    """Fingerprint of the held-out rows."""
    val_tokens: str
    """How many of their tokens count; all, or the first so many."""
    recipe: str
    """Fingerprint of shape, optimizer, batch, budget and seed."""
    ladder: str
    """Fingerprint of the ladder's file when it was run."""
    commit: str
    """Of this code."""


@dataclass(frozen=True)
class Speed:
    """Training speed of an arm, measured in turn with the others on one thread of a CPU."""

    rung: str
    arm: str
    step_seconds: float
    """Median."""
    flops_per_second: float
    """Training FLOPs over that time."""
    tokens_per_second: float
    rounds: int
    """Steps that the median is of."""


def _read(path: Path, cls: type) -> list[Any]:
    """The lines of a file as dataclasses; none where there is no file."""
    if not path.is_file():
        return []
    hints = get_type_hints(cls)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    found = []
    for line, row in enumerate(rows, start=2):
        try:
            found.append(cls(**{name: kind(row[name]) for name, kind in hints.items()}))
        except (KeyError, ValueError, TypeError):
            raise UserError(
                f"{path} line {line} is no line that bov sweep --ladder writes: restore the file, "
                "or give another --output"
            ) from None
    return found


def _write(path: Path, cls: type, rows: Sequence[Any]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f.name for f in fields(cls)])
    writer.writerows(astuple(row) for row in rows)
    write_file(path, text.getvalue())


def read_results(folder: Path) -> dict[str, Result]:
    """The ended runs by name.

    Raises:
        UserError: a file that is damaged, or that mixes runs that cannot be compared.
    """
    path = folder / RUNS
    found = {result.run: result for result in _read(path, Result)}
    results = list(found.values())
    for result in results[1:]:
        _refuse_other(path, results[0], result)
    return found


def _refuse_other(path: Path, one: Result, other: Result) -> None:
    for name in SAME:
        ours, theirs = getattr(one, name), getattr(other, name)
        if ours != theirs:
            raise UserError(
                f"{path} holds runs of {name} {ours}, and {other.run} is of {theirs}: they cannot "
                "be compared; give another --output"
            )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While nobody else on this machine, or beside it on a file system with locks, writes there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{RUNS}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def add_result(folder: Path, result: Result, order: Sequence[str]) -> None:
    """Adds a line to runs.csv, whose lines come in the given order of names.

    Raises:
        UserError: it cannot be compared with those that are there.
    """
    with _alone(folder):
        found = read_results(folder)
        if others := [other for name, other in found.items() if name != result.run]:
            _refuse_other(folder / RUNS, others[0], result)
        found[result.run] = result
        at = {name: i for i, name in enumerate(order)}
        _write(folder / RUNS, Result, sorted(found.values(), key=lambda r: at.get(r.run, len(at))))


def read_speeds(folder: Path) -> list[Speed]:
    """What speed.csv holds."""
    return _read(folder / SPEED, Speed)


def write_speeds(folder: Path, speeds: Sequence[Speed]) -> None:
    """Writes speed.csv."""
    _write(folder / SPEED, Speed, speeds)


def of_rungs(
    results: Sequence[Result], arm: str, rung: str, kind: str = "rung"
) -> dict[int, Result]:
    """The runs of an arm on a rung, by seed."""
    return {r.seed: r for r in results if (r.arm, r.rung, r.kind) == (arm, rung, kind)}


def refuse_a_baseline_without_numbers(ladder: Ladder, results: Sequence[Result]) -> None:
    """Multipliers are taken to it."""
    for result in results:
        counts = result.arm == ladder.baseline and result.kind == "rung"
        if counts and not math.isfinite(result.val_bpb):
            raise UserError(
                f"{result.run}, of the baseline, has val_bpb {result.val_bpb}: no multiplier can "
                f"be taken to it; remove its line from {RUNS} to train it again, with lower rates "
                "in the ladder's file"
            )
