"""Resumes a run, saves it, and stops it at a step boundary."""

from lightning.pytorch import Callback, LightningModule, Trainer

from bov_lightning.checkpoint.directory import step_of
from bov_lightning.checkpoint.resuming import optimizer_state_of, random_state, restore, weights_of
from bov_lightning.checkpoint.writing import CheckpointWriter
from bov_lightning.console import say
from bov_lightning.distributed import preemption
from bov_lightning.distributed.sharding import reshard
from bov_lightning.errors import UserError
from bov_lightning.files import remove
from bov_lightning.recipe.sections import CheckpointConfig, ValidationConfig
from bov_lightning.run.directory import RunDirectory
from bov_lightning.run.loggers import MetricsCSV, RunLogger
from bov_lightning.training.callbacks.guard import guard_of
from bov_lightning.training.internals import dump_state, hand_over_state, validate_now


class Checkpointer(Callback):
    """Resumes a run, writes step-numbered checkpoints, and stops at a step boundary when told to.

    A checkpoint holds the state at a step boundary. Where a validation follows the boundary, that
    state is kept until the next one, so that a signal during validation loses nothing either.
    """

    failures_allowed = 2
    """Saves in a row that may fail before training stops: disks fill up, and are cleaned up."""

    def __init__(
        self, run: RunDirectory, config: CheckpointConfig, validation: ValidationConfig,
        resume: bool, config_yaml: str, metrics: MetricsCSV,
    ):  # fmt: skip
        """
        Args:
            run: the run directory.
            config: when to save and what to keep.
            validation: when validations follow.
            resume: whether to continue from the newest complete checkpoint.
            config_yaml: the resolved recipe.
            metrics: tells what has been validated.
        """
        self.run, self.config, self.validation, self.resume = run, config, validation, resume
        self.config_yaml, self.metrics = config_yaml, metrics
        self.writer: CheckpointWriter | None = None
        self.saved_step = self.step = 0
        self.n_failed = 0
        self._kept: tuple[int, dict, dict] | None = None

    def state(self) -> tuple[int | None, int | None, str]:
        """For the screen: the step of the newest complete checkpoint, that of the one being
        written, and why the last one failed."""
        if self.writer is None:
            return None, None, ""
        return self.writer.complete, self.writer.writing, self.writer.failure

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Restores model and optimizer, and hands the rest to Lightning."""
        ranks = trainer.strategy.new_ranks()
        self.writer = CheckpointWriter(self.run.path, self.config_yaml, ranks)
        if not self.resume:
            return
        checkpoint, rest, messages = restore(
            self.run.path, module.model, trainer.optimizers[0], ranks, module.device
        )
        if trainer.is_global_zero:
            for message in messages:
                say(message)
        if checkpoint is not None:
            self.saved_step = self.step = self.writer.complete = rest["global_step"]
            for logger in trainer.loggers:
                if isinstance(logger, RunLogger):
                    logger.resume_at(self.step)
            hand_over_state(trainer, rest)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Stops if a signal came before the first step; validates what was to be validated."""
        self.stop_if_told(trainer, module, trainer.strategy.agree_on_signal())
        step = trainer.global_step
        missing = step > 0 and step % self.validation.every_steps == 0
        missing = missing and "val_bpb" not in self.metrics.rows.get(step, {})
        if trainer.strategy.broadcast(missing):
            validate_now(trainer)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """Saves when a due step has just been taken, or when told to stop."""
        step = trainer.global_step
        if step == self.step:
            return
        self.step, self._kept = step, None
        last = step == trainer.max_steps
        if last or step % self.config.every_steps == 0:
            self._save(trainer, module)
            if last or not self.config.asynchronous:
                self._finish(last)
        elif step % self.validation.every_steps == 0:
            self._kept = self._state(trainer, module)
        self.stop_if_told(trainer, module, guard_of(trainer).signal)

    def on_validation_batch_end(self, trainer, module, *arguments) -> None:
        """A validation is left when told to stop; the resumed run repeats it."""
        self.stop_if_told(trainer, module, trainer.strategy.agree_on_signal())

    def on_exception(self, trainer: Trainer, module: LightningModule, exception) -> None:
        """Lets a checkpoint that is being written be finished."""
        if self.writer is not None:
            self.writer.wait(quietly=True)

    def _state(self, trainer: Trainer, module: LightningModule) -> tuple[int, dict, dict]:
        random = random_state(trainer.global_rank, module.device)
        return trainer.global_step, dump_state(trainer), random

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        step, rest, random = self._kept or self._state(trainer, module)
        self._finish(False)
        # After a validation batch some parameters are still whole.
        reshard(module.model)
        optimizer = optimizer_state_of(module.model, trainer.optimizers[0])
        weights = weights_of(module.model)
        self.writer.start(step, weights, optimizer | random, rest, self._prune)
        self.saved_step = step

    def _finish(self, must_succeed: bool) -> None:
        """Waits for the checkpoint being written; some may fail, but not the last one."""
        try:
            if self.writer.wait():
                self.n_failed = 0
        except UserError as error:
            self.n_failed += 1
            if must_succeed or self.n_failed > self.failures_allowed:
                raise
            if self.writer.ranks.rank == 0:
                say(f"warning: {error}; training goes on")

    def stop_if_told(self, trainer: Trainer, module: LightningModule, code: int) -> None:
        """Saves and ends the process at this step boundary, if ``code`` is an exit code."""
        if not code:
            return
        if trainer.state.fn == "fit" and self.saved_step != self.step:
            self._save(trainer, module)
        if trainer.state.fn == "fit":
            self._finish(True)
        if trainer.is_global_zero:
            why = "time limit" if code == preemption.REQUEUE else "SIGTERM"
            say(f"stopped at step {self.step} ({why}): the same command continues {self.run}")
        launched_by_us = not trainer.strategy.cluster_environment.creates_processes_externally
        # Lightning kills everything when a process that it started exits with a code.
        raise preemption.Preempted(0 if launched_by_us and trainer.local_rank else code)

    def _prune(self) -> None:
        for path in self.run.checkpoints()[: -self.config.keep_last]:
            step = step_of(path)
            if not self.config.keep_every or step % self.config.keep_every:
                # Renamed first: a half-deleted directory must not pass for a checkpoint.
                doomed = path.with_name(f".{path.name}.old")
                remove(doomed)
                remove(path.rename(doomed))
