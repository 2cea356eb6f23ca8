"""Run directories: what a run leaves behind, by name.

runs/NAME/
    config.yaml     the resolved recipe
    run.json        versions, git commit, data fingerprint, parameter and FLOP figures
    tokenizer/
    checkpoints/    see bov_lightning.checkpoint.directory
    eval/           results of benchmarks by step, see evaluation.results
    metrics.csv     a row per logged step
    events.out.*    TensorBoard
    recipe.yaml, *.sbatch, slurm-*.out    of a SLURM job, see bov_lightning.launch.submit
    sweep.log       what `bov fit` said, as part of a sweep
"""

import csv
import hashlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

from bov_lightning.checkpoint.directory import CONFIG, TOKENIZER, complete_checkpoints, step_name
from bov_lightning.errors import UserError


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
    """Renames a run directory to the first free NAME.old-N."""
    n = 1
    while (aside := run.with_name(f"{run.name}.old-{n}")).exists():
        n += 1
    return run.rename(aside)


def logger_run_id(run: Path, afresh: bool) -> str:
    """A name that a run keeps through all requeues; another one after ``--resume never``."""
    n_before = len(list(run.parent.glob(f"{run.name}.old-*"))) + (afresh and run.exists())
    return hashlib.sha256(f"{run.resolve()} {n_before}".encode()).hexdigest()[:12]
