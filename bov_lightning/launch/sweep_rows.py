"""The runs of a sweep: what each trains, and how far it is."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bov_lightning.checkpoint.directory import step_of
from bov_lightning.errors import UserError
from bov_lightning.planning.cost import make_plan
from bov_lightning.planning.own_source import try_own_source
from bov_lightning.recipe.budget import accumulation
from bov_lightning.recipe.data_module import data_section
from bov_lightning.recipe.given import Given, read
from bov_lightning.recipe.overlays import find_recipe, read_yaml
from bov_lightning.recipe.sameness import fixed_difference, plain
from bov_lightning.report.reading import read_metrics
from bov_lightning.run.directory import RunDirectory
from bov_lightning.run.own_code import refuse_other_code


class Measured(NamedTuple):
    """How far a run is."""

    step: int
    """The last step that was logged; 0: none."""
    validated_step: int
    """The last step that was validated; 0: none."""
    val_bpb: float
    """Bits per byte there."""


@dataclass(frozen=True)
class Row:
    """One run of the table."""

    value: str
    """Name of the value overlay."""
    seed: int
    """Seed of initialisation and data order."""
    given: Given
    """What it trains."""
    arguments: list[str]
    """Of `bov fit`."""
    plan: dict[str, Any]
    """See `budget.make_plan`."""

    @property
    def run(self) -> Path:
        """The run directory's path."""
        return self.given.run

    @property
    def directory(self) -> RunDirectory:
        """The run directory."""
        return RunDirectory(self.run)

    @property
    def n_step(self) -> int:
        """Optimizer steps of the whole run."""
        return self.plan["iterations"]

    def step(self) -> int:
        """Steps that the newest complete checkpoint holds."""
        return max(map(step_of, self.directory.checkpoints()), default=0)

    def last_step(self) -> int:
        """With which the run ends, or has been ended before its budget was spent."""
        ended = self.directory.ended()
        return self.n_step if ended is None else ended.step

    def measured(self) -> "Measured":
        """What metrics.csv says."""
        try:
            metrics, _ = read_metrics(self.directory.metrics_file, self.given.recipe.batch.tokens)
        except UserError:
            return Measured(0, 0, math.nan)
        validated = np.flatnonzero(np.isfinite(metrics["val_bpb"]))
        step = int(metrics["step"][-1])
        if not len(validated):
            return Measured(step, 0, math.nan)
        last = validated[-1]
        return Measured(step, int(metrics["step"][last]), float(metrics["val_bpb"][last]))

    def progress(self) -> str:
        """How far the run is, for people."""
        measured = self.measured()
        bpb = f"  val_bpb {measured.val_bpb:.4f}" if measured.validated_step else ""
        # Checkpoints may come more often than rows of metrics.
        early = "" if self.last_step() == self.n_step else " (ended early)"
        return f"step {max(measured.step, self.step())}/{self.n_step}{early}{bpb}"

    def is_finished(self) -> bool:
        """Whether the last checkpoint is there, validated, and evaluated if the recipe asks so.

        The last one is that of the budget's last step, or the one at which the run was ended.
        """
        last = self.last_step()
        if self.step() != last:
            return False
        if self.measured().validated_step != last:
            return False
        evaluation = self.given.recipe.evaluation
        if not (evaluation.tasks and evaluation.at_end):
            return True
        return any(self.directory.evaluation(last).glob("results*.json"))

    def check(self) -> None:
        """Refuses what `bov fit` would, before anything trains: a batch that does not divide, a
        directory of this name that holds another run."""
        recipe = self.given.recipe
        batch, config = recipe.batch, recipe.model.config
        accumulation(batch.tokens, batch.micro, config.sequence_len, 1)
        try_own_source(config)
        if not self.directory.config.is_file():
            return
        given = {name: plain(value) for name, value in vars(recipe).items()}
        given["data"] = data_section(self.given)
        # Only what the recipe says: the stored one also has the data's defaults.
        if difference := fixed_difference(given, read_yaml(self.directory.config)):
            key, now, before = difference
            raise UserError(
                f"{self.run} was trained with {key} {before!r}, not {now!r}: give the sweep "
                "another --run.name"
            )
        if recipe.resume != "changed_code":
            refuse_other_code(self.directory, config.value.source)
        if self.step() > self.n_step:
            raise UserError(
                f"{self.run} has trained {self.step()} steps, but the budget pays for "
                f"{self.n_step}: give the sweep another --run.name"
            )


def make_rows(
    values: list[str], seeds: list[int], paths: list[str], options: list[str],
    text: dict[str, list[str]],
) -> list[Row]:  # fmt: skip
    """The runs of a sweep, seed by seed, so that all rows of one seed are there early.

    Args:
        values: value overlays, by name or path; the first is the baseline.
        seeds: of initialisation and data order.
        paths: recipe files that all rows share.
        options: dotted keys and values that all rows share.
        text: ``data`` and ``val_data``, as for `recipe.given.read`.
    """
    base = read(paths, options, **text)
    budget, name = base.budget, base.recipe.run.name
    files = [find_recipe(v if v.endswith((".yaml", ".yml")) else f"values/{v}") for v in values]
    names = [file.stem for file in files]
    for kind, asked in (("--values", names), ("--seeds", seeds)):
        if len(set(asked)) < len(asked):
            raise UserError(f"{kind}: {max(asked, key=asked.count)} is given twice")
    text_options = [
        x for key in ("data", "val_data") for files_ in text[key]
        for x in (f"--{key.replace('_', '-')}", files_)
    ]  # fmt: skip

    def row(value: str, file: Path, seed: int, flops: float | None) -> Row:
        own = [*paths, str(file)]
        extra = ["--seed", str(seed), "--run.name", f"{name}-{value}-seed{seed}"]
        extra += [] if flops is None else ["--model.budget.flops", repr(flops)]
        given = read(own, [*options, *extra], **text)
        recipe = given.recipe
        plan = make_plan(recipe.model.config, recipe.model.budget, recipe.batch.tokens)
        configs = [x for path in own for x in ("--config", path)]
        return Row(value, seed, given, [*configs, *text_options, *options, *extra], plan)

    # What the first row's tokens or steps cost is what every row may cost.
    flops = budget.flops or row(names[0], files[0], seeds[0], None).plan["flops"]
    return [row(*value, s, flops) for s in seeds for value in zip(names, files, strict=True)]
