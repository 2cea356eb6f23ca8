"""Benchmarks during training, on all ranks, without a trace in the training itself."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from bov_lightning.console import say
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.errors import EvaluationInterruptedError
from bov_lightning.recipe.sections import EvaluationConfig
from bov_lightning.run.directory import EVAL
from bov_lightning.run.status import Status
from data_modules.tokenizer import transformers_tokenizer
from evaluation.backends import TransformerBackend
from evaluation.heldout import needs_heldout, write_from_data
from evaluation.report import headline
from evaluation.results import (
    HELDOUT,
    claim_step,
    is_done,
    metrics,
    publish,
    read_results,
    step_directory,
)
from evaluation.runner import Benchmarks, Runtime, download_data, load_tasks, run

LINES_EVERY_S = 30.0


def benchmarks_of(config: EvaluationConfig, run_directory: Path) -> Benchmarks:
    """What a recipe's evaluation section asks for."""
    return Benchmarks(
        tasks=tuple(config.tasks),
        max_per_task=config.max_per_task,
        data_dir=config.data_dir,
        include_path=config.include_path,
        heldout_dir=str(run_directory / EVAL / HELDOUT),
        time_limit=config.time_limit,
    )


class Evaluator(Callback):
    """Evaluates the model at the steps that a recipe asks for, each exactly once.

    A step whose results lie in the run directory is not evaluated again, whoever made them. One
    whose evaluation was interrupted is evaluated when the run is resumed: at that step, if that is
    where the checkpoint is, or when training comes by again.

    Args:
        run_directory: results go to its ``eval``.
        config: the recipe's evaluation section.
        checkpoint_every: steps between checkpoints.
        should_stop: asked on every rank between batches; True on one interrupts the evaluation on
            all.
        on_interrupt: called on every rank then, at the step boundary that the evaluation belongs
            to: the place to save and stop, so that the resumed run makes up for it.
        status: what the run's view shows.
        on_evaluated: called on every rank after an evaluation, which took its time.
    """

    def __init__(
        self,
        run_directory: Path,
        config: EvaluationConfig,
        checkpoint_every: int,
        should_stop: Callable[[], bool] = lambda: False,
        on_interrupt: Callable[[Trainer, LightningModule], None] = lambda trainer, module: None,
        status: Status | None = None,
        on_evaluated: Callable[[Trainer], None] = lambda trainer: None,
    ):
        self.run_directory, self.config = run_directory, config
        self.checkpoint_every = checkpoint_every
        self.should_stop, self.on_interrupt = should_stop, on_interrupt
        self.status, self.on_evaluated = status or Status(run_directory.name), on_evaluated
        self.benchmarks = benchmarks_of(config, run_directory)
        self.handled_step = 0

    def is_due(self, step: int, max_steps: int) -> bool:
        """Whether a step is one to evaluate at."""
        config, last = self.config, step == max_steps
        every = config.every_steps is not None and step % config.every_steps == 0
        saved = config.at_checkpoints and (step % self.checkpoint_every == 0 or last)
        return step > 0 and (every or saved or (config.at_end and last))

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Finds out before the first step whether tasks and data are there."""
        self.ranks = Ranks.of_job()
        self.ranks.together(lambda: self._prepare(trainer))
        # Freed again: rows and few-shot examples need not lie in memory while training.
        self.ranks.together(lambda: load_tasks(self.benchmarks))
        self.tokenizer = transformers_tokenizer(trainer.datamodule.tokenizer_directory)

    def _prepare(self, trainer: Trainer) -> None:
        if self.config.download:
            download_data(self.benchmarks, say)
        directory = Path(self.benchmarks.heldout_dir)
        if needs_heldout(self.config.tasks) and trainer.is_global_zero:
            write_from_data(directory, trainer.datamodule)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Makes up for an evaluation that was cut off after its checkpoint."""
        self._handle(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """Evaluates when a due step has just been taken."""
        self._handle(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """The last step, where it turned out to be one only afterwards."""
        self._handle(trainer, module)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """The last step, where a resumed run had nothing else left to do."""
        self._handle(trainer, module)

    def _handle(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if step == self.handled_step or not self.is_due(step, trainer.max_steps):
            return
        self.handled_step = step
        directory = step_directory(self.run_directory, step)
        settings = self.benchmarks.settings
        claim = None

        def claimed() -> str:
            nonlocal claim
            if not trainer.is_global_zero:
                return "done"
            if self._is_gone(f"step {step} is not evaluated"):
                return "nowhere"
            claim = claim_step(self.run_directory, step, settings)
            if claim is not None:
                return "mine"
            return "done" if is_done(directory, settings) else "elsewhere"

        outcome = self.ranks.broadcast(self.ranks.together(claimed))
        if outcome == "mine":
            with claim or contextlib.nullcontext():  # rank 0 holds it for all
                finished = self._evaluate(trainer, module, step)
            if not finished:
                self.on_interrupt(trainer, module)
        elif outcome == "done" and trainer.is_global_zero:
            # A resumed run has dropped the lines that it repeats.
            for results in read_results(directory):
                if results.get("evaluation", {}).get("settings") == settings:
                    self._log(trainer, results, step)

    def _evaluate(self, trainer: Trainer, module: LightningModule, step: int) -> bool:
        """Whether it came to its end."""
        started = time.monotonic()
        shown = _Progress(self.status, step, trainer.is_global_zero)
        runtime = Runtime(
            budget=self.config.tokens_per_forward, should_stop=self.should_stop,
            progress=shown.update, ranks=self.ranks,
        )  # fmt: skip
        try:
            with trainer.precision_plugin.forward_context():
                backend = TransformerBackend(module.model)
                results = run(module.model, backend, self.tokenizer, self.benchmarks, runtime)
        except EvaluationInterruptedError:
            if trainer.is_global_zero:
                say(f"evaluation at step {step} interrupted; it is made up for after resuming")
            return False
        finally:
            shown.end()
        self.ranks.together(lambda: self._publish(trainer, results, step))
        if trainer.is_global_zero:
            seconds = time.monotonic() - started
            say(f"step {step}  {headline(results)}  (evaluated in {seconds:.1f} s)")
        self.on_evaluated(trainer)
        return True

    def _publish(self, trainer: Trainer, results: dict[str, Any], step: int) -> None:
        if not trainer.is_global_zero:
            return
        if not self._is_gone(f"the results of step {step} are not written"):
            publish(self.run_directory, step, results, str(self.run_directory))
        self._log(trainer, results, step)

    def _is_gone(self, what: str) -> bool:
        """Whether the run was moved away; nothing is made in its place: it may be put back."""
        if self.run_directory.is_dir():
            return False
        say(
            f"warning: {what}: {self.run_directory} was moved or deleted while it is trained "
            "(`bov evaluate --watch` makes up for it)"
        )
        return True

    def _log(self, trainer: Trainer, results: dict[str, Any], step: int) -> None:
        self.status.evaluated_step, self.status.evaluation = step, headline(results)
        for logger in trainer.loggers:
            logger.log_metrics(metrics(results), step=step)
            logger.save()


class _Progress:
    """What the run's view says meanwhile, or a line now and then where there is none."""

    def __init__(self, status: Status, step: int, is_zero: bool):
        self.status, self.step = status, step
        self.says_lines = is_zero and not status.is_shown
        self.line_at = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Takes finished and total rows of this rank."""
        line = f"evaluating step {self.step}: {done:,} of {total:,} rows"
        self.status.activity = line
        if self.says_lines and time.monotonic() - self.line_at >= LINES_EVERY_S:
            self.line_at = time.monotonic()
            say(line)

    def end(self) -> None:
        """Says that it is over."""
        self.status.activity = ""
