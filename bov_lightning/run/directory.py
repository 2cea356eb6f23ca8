"""Run directories: what a run leaves behind, by name.

runs/NAME/
    config.yaml     the resolved recipe
    run.json        versions, git commit, data fingerprint, parameter and FLOP figures
    tokenizer/
    code/           the files of a value source of somebody's own, see bov_lightning.run.own_code
    checkpoints/    see bov_lightning.checkpoint.directory
    eval/           results of benchmarks by step, see evaluation.results
    metrics.csv     a row per logged step
    ended.json      of a run that was ended before its last step: at which, and by what
    logger-id       by which loggers such as Weights & Biases know the run
    .training.N     who trains it just now, see bov_lightning.claims
    events.out.*    TensorBoard
    recipe.yaml, *.sbatch, slurm-*.out    of a SLURM job, see bov_lightning.launch.submit
    sweep.log       what `bov fit` said, as part of a sweep
"""

import contextlib
import csv
import hashlib
import io
import json
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bov_lightning import claims
from bov_lightning.checkpoint.directory import (
    CODE,
    CONFIG,
    TOKENIZER,
    complete_checkpoints,
    step_name,
    step_of,
)
from bov_lightning.console import say
from bov_lightning.errors import UserError
from bov_lightning.files import file_error

TRAINING_CLAIM = ".training"
"""Held by the process that trains the run, its rank 0 where there are several."""


class Ended(NamedTuple):
    """An end before the last step that the budget pays for."""

    step: int
    """Optimizer steps taken."""
    by: str
    """What ended it."""


class RunDirectory:
    """The files of one run, which need not be there yet."""

    def __init__(self, path: str | Path):
        """``path``: runs/NAME."""
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """NAME."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / CONFIG

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's directory."""
        return self.path / TOKENIZER

    @property
    def code(self) -> Path:
        """The directory of the code of somebody's own."""
        return self.path / CODE

    @property
    def facts_file(self) -> Path:
        """run.json."""
        return self.path / "run.json"

    @property
    def metrics_file(self) -> Path:
        """metrics.csv."""
        return self.path / "metrics.csv"

    @property
    def log(self) -> Path:
        """What a sweep's `bov fit` said."""
        return self.path / "sweep.log"

    def checkpoints(self) -> list[Path]:
        """All complete checkpoints, oldest first."""
        return complete_checkpoints(self.path)

    @property
    def logger_id_file(self) -> Path:
        """logger-id."""
        return self.path / "logger-id"

    def logger_id(self) -> str:
        """The name by which loggers know the run; a new one where it has none yet.

        Whoever trains keeps it in the directory: it goes where that goes, and ends with it.
        """
        with contextlib.suppress(OSError, UnicodeError):
            if found := self.logger_id_file.read_text(encoding="utf-8").strip():
                return found
        if not self.config.is_file():
            return uuid.uuid4().hex[:12]
        # A run of before there was that file: its place told its name.
        n_before = len(list(self.path.parent.glob(f"{self.name}.old-*")))
        return hashlib.sha256(f"{self.path.resolve()} {n_before}".encode()).hexdigest()[:12]

    @property
    def ended_file(self) -> Path:
        """ended.json."""
        return self.path / "ended.json"

    def ended(self) -> Ended | None:
        """How the run was ended before its last step; None: it was not, or nobody can tell.

        Counts only while the checkpoint of that step is the newest one.
        """
        try:
            found = json.loads(self.ended_file.read_text(encoding="utf-8"))
            ended = Ended(int(found["step"]), str(found["by"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        newest = [step_of(path) for path in self.checkpoints()[-1:]]
        return ended if newest == [ended.step] else None

    def trainer(self) -> dict[str, Any] | None:
        """Who trains the run now, see `claims.describe`; None: nobody."""
        return claims.owner_of(self.path, TRAINING_CLAIM)

    def claim(self, stop: Callable[[], bool] = lambda: False) -> claims.Claim:
        """The right to train the run, whose directory is made.

        Where it cannot be seen whether its owner lives, on another machine, that is waited for.

        Args:
            stop: asked while it waits; True gives up.

        Raises:
            UserError: somebody trains it, and who, or the directory cannot be written.
        """
        seen: list[dict[str, Any]] = []

        def go_on(owner: dict[str, Any], is_certain: bool) -> bool:
            if not seen and not is_certain:
                who = claims.describe(owner)
                say(f"{self} was being trained by {who}: waiting to see whether it still is")
            seen.append(owner)
            return not is_certain

        try:
            claim = claims.wait_and_take(self.path, TRAINING_CLAIM, go_on=go_on, stop=stop)
        except OSError as error:
            raise file_error(error, self.path) from error
        if claim is None:
            raise UserError(
                f"{self} is being trained by {claims.describe(seen[-1] if seen else {})}: wait for "
                "its end, stop it, or use another run.name"
            )
        return claim

    def evaluation(self, step: int) -> Path:
        """The directory of the benchmarks' results at ``step``."""
        return self.path / EVAL / step_name(step)

    def facts(self) -> dict[str, Any]:
        """What run.json says; one that cannot be read is a `UserError`."""
        try:
            facts = json.loads(self.facts_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.facts_file} cannot be read: {error}") from error
        if not isinstance(facts, dict):
            raise UserError(f"{self.facts_file} cannot be read: it is no JSON object")
        return facts

    def metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv, cells that are empty left out; a `UserError` if unreadable.

        A line that is being written just now is left out.
        """
        try:
            text = self.metrics_file.read_text(encoding="utf-8")
            rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{self.metrics_file} cannot be read: {error}") from error
        return [{k: v for k, v in row.items() if k is not None and v} for row in rows]


EVAL = "eval"
"""In a run directory: a directory per evaluated step, and the tasks made of its held-out text."""


def git_commit() -> str | None:
    """The commit of the source checkout that runs; None when it is installed without one."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def move_aside(run: Path) -> Path:
    """Renames a run directory to the first free NAME.old-N; one that is trained is refused."""
    n = 1
    while (aside := run.with_name(f"{run.name}.old-{n}")).exists():
        n += 1
    with RunDirectory(run).claim() as claim:
        run.rename(aside)
        claim.follow(aside)
    return aside
