"""Evaluates the checkpoints of a run as they appear, in a process beside it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bov_lightning import claims
from bov_lightning.checkpoint.directory import (
    complete_checkpoints,
    damaged_file,
    read_marker,
    step_of,
)
from bov_lightning.errors import EvaluationInterruptedError
from bov_lightning.recipe.budget import horizon
from bov_lightning.recipe.building import build
from bov_lightning.recipe.keys import check_keys
from bov_lightning.recipe.overlays import read_yaml
from bov_lightning.recipe.sections import Recipe
from bov_lightning.run.directory import RunDirectory, UserError
from evaluation.report import headline
from evaluation.results import (
    claim_step,
    is_done,
    metrics,
    publish,
    step_directory,
)


def last_step(run: Path) -> int | None:
    """The step that the run ends, or was ended, with; None while it has no configuration."""
    path = RunDirectory(run).config
    if not path.is_file():
        return None
    if ended := RunDirectory(run).ended():
        return ended.step
    settings = read_yaml(path)
    check_keys(settings, str(path))
    recipe = build(Recipe, settings, str(path))
    return horizon(recipe.model.budget, recipe.model.config, recipe.batch.tokens)


class Watcher:
    """Evaluates every checkpoint of a run exactly once, however many watchers there are.

    Args:
        run: the run directory, which need not be there yet.
        settings: what tells this evaluation from others of the same checkpoint.
        evaluate: the results of a checkpoint.
        report: takes lines to show.
        should_stop: ends the watch.
        poll_s: seconds between two looks.
        stale_after_s: seconds without a sign of life after which another watcher counts as dead.
    """

    def __init__(
        self,
        run: Path,
        settings: dict[str, Any],
        evaluate: Callable[[Path], dict[str, Any]],
        report: Callable[[str], None],
        should_stop: Callable[[], bool] = lambda: False,
        poll_s: float = 10.0,
        stale_after_s: float = claims.STALE_AFTER_S,
    ):
        self.run, self.settings, self.evaluate = run, settings, evaluate
        self.report, self.should_stop = report, should_stop
        self.poll_s, self.stale_after_s = poll_s, stale_after_s
        # Imports Lightning, which takes seconds that evaluating without watching need not pay.
        from bov_lightning.run.loggers import TensorBoardEvents

        self.events = TensorBoardEvents(RunDirectory(run))
        self.gone: set[int] = set()

    def watch(self) -> None:
        """Runs until the last step's checkpoint is evaluated.

        Raises:
            EvaluationInterruptedError: ``should_stop`` said so.
        """
        self.report(f"watching {self.run} for checkpoints")
        while True:
            found = {read_step(path): path for path in complete_checkpoints(self.run)}
            pending = [s for s in sorted(found) if s not in self.gone and not self._is_done(s)]
            progressed = [self._try(step, found[step]) for step in pending]
            end = last_step(self.run)
            if end is not None and end in found and all(map(self._is_handled, found)):
                self.report(f"{self.run}: all checkpoints up to the last step are evaluated")
                return
            waited = 0.0
            while not any(progressed) and waited < self.poll_s:
                if self.should_stop():
                    raise EvaluationInterruptedError("stopped watching")
                time.sleep(min(0.2, self.poll_s))
                waited += min(0.2, self.poll_s)

    def _is_done(self, step: int) -> bool:
        return is_done(step_directory(self.run, step), self.settings)

    def _is_handled(self, step: int) -> bool:
        return step in self.gone or self._is_done(step)

    def _try(self, step: int, checkpoint: Path) -> bool:
        """Evaluates a checkpoint, unless somebody else does; whether it did."""
        claim = claim_step(self.run, step, self.settings, self.stale_after_s)
        if claim is None:
            return False
        with claim:
            if checkpoint.is_dir() and (damage := damaged_file(checkpoint)):
                self.gone.add(step)
                self.report(f"skipped {checkpoint}: {damage}")
                return True
            try:
                results = self.evaluate(checkpoint)
            except (UserError, OSError) as error:
                if checkpoint.is_dir():
                    raise
                self.gone.add(step)
                self.report(f"step {step}: the checkpoint was removed while it was read ({error})")
                return True
            if not claim.is_mine():
                self.report(f"step {step}: another watcher took over; these results are dropped")
                return False
            publish(self.run, step, results, str(checkpoint))
            self.events.log_metrics(metrics(results), step)
            self.events.save()
        self.report(f"step {step}  {headline(results)}")
        return True


def read_step(checkpoint: Path) -> int:
    """The step of a checkpoint of a run; by its name, if it has just been removed."""
    try:
        return read_marker(checkpoint)["step"]
    except UserError:
        return step_of(checkpoint)
