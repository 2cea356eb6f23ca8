"""Resumes a run, saves it, and stops it at a step boundary."""

import json
from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer

from bov_lightning.checkpoint.directory import prune
from bov_lightning.checkpoint.resuming import (
    State,
    capture_random,
    optimizer_state_of,
    random_state,
    restore,
    weights_of,
)
from bov_lightning.checkpoint.writing import CheckpointWriter
from bov_lightning.console import say
from bov_lightning.distributed import preemption
from bov_lightning.distributed.sharding import reshard
from bov_lightning.errors import UserError
from bov_lightning.files import write_file
from bov_lightning.recipe.sections import CheckpointConfig, ValidationConfig
from bov_lightning.run.directory import RunDirectory
from bov_lightning.run.loggers import MetricsCSV, RunLogger
from bov_lightning.training.callbacks.guard import guard_of
from bov_lightning.training.internals import (
    dump_state,
    end_here,
    hand_over_state,
    stop_only_after,
    validate_now,
)


class Checkpointer(Callback):
    """Resumes a run, writes step-numbered checkpoints, and stops at a step boundary when told to.

    A checkpoint holds the state at a step boundary. Where a validation follows the boundary, that
    state is kept until the next one, so that a signal during validation loses nothing either. A
    single process keeps it always: whatever ends the run, the last step that it took is saved.
    """

    failures_allowed = 2
    """Saves in a row that may fail before training stops: disks fill up, and are cleaned up."""

    def __init__(
        self, run: RunDirectory, config: CheckpointConfig, validation: ValidationConfig,
        resume: bool, config_yaml: str, metrics: MetricsCSV,
        check: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """
        Args:
            run: the run directory.
            config: when to save and what to keep.
            validation: when validations follow.
            resume: whether to continue from the newest complete checkpoint.
            config_yaml: the resolved recipe.
            metrics: tells what has been validated.
            check: called on rank 0 before anything is written; raises where it must not be.
        """
        self.run, self.config, self.validation, self.resume = run, config, validation, resume
        self.config_yaml, self.metrics, self.check = config_yaml, metrics, check
        self.writer: CheckpointWriter | None = None
        self.saved_step = self.step = 0
        self.n_failed = 0
        self._kept: tuple[int, dict, tuple] | None = None
        self._stepping, self._n_batch = False, 0
        self._prepared = False

    def state(self) -> tuple[int | None, int | None, str]:
        """For the screen: the step of the newest complete checkpoint, that of the one being
        written, and why the last one failed."""
        if self.writer is None:
            return None, None, ""
        return self.writer.complete, self.writer.writing, self.writer.failure

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Restores model and optimizer, and hands the rest to Lightning."""
        ranks = trainer.strategy.new_ranks()
        self.writer = CheckpointWriter(self.run.path, self.config_yaml, ranks, self.check)
        if not self.resume:
            return
        checkpoint, rest, messages = restore(
            self.run.path, module.model, trainer.optimizers[0], ranks, module.device
        )
        if trainer.is_global_zero:
            for message in messages:
                say(message)
        if checkpoint is not None:
            if rest["global_step"] > module.n_step:
                raise UserError(
                    f"{self.run} has trained {rest['global_step']} steps, but the budget pays for "
                    f"{module.n_step}: raise it, or use another run.name or --resume never"
                )
            self.saved_step = self.step = self.writer.complete = rest["global_step"]
            hand_over_state(trainer, rest)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.resume_at(self.step)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Stops if a signal came before the first step; validates what was to be validated."""
        if trainer.is_global_zero:
            self.run.ended_file.unlink(missing_ok=True)  # it goes on
        self.stop_if_told(trainer, module, trainer.strategy.agree_on_signal())
        step = trainer.global_step
        missing = step > 0 and step % self.validation.every_steps == 0
        # An EarlyStopping of before the checkpoint has not seen what was measured after it.
        counts = any(isinstance(callback, EarlyStopping) for callback in trainer.callbacks)
        missing = missing and (counts or "val_bpb" not in self.metrics.rows.get(step, {}))
        if trainer.strategy.broadcast(missing):
            validate_now(trainer)

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        """Has a step that has begun come to its end."""
        self._n_batch += 1
        stop_only_after(trainer, self.step + 1)

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        """From here to the step's end, parameters are half old and half new."""
        self._stepping = True

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """Saves when a due step has just been taken, or when told to stop."""
        step = trainer.global_step
        if step == self.step:
            return
        self.step, self._kept, self._stepping = step, None, False
        if trainer.world_size == 1 or step % self.validation.every_steps == 0:
            self._keep(trainer, module)
        last = step == trainer.max_steps or trainer.should_stop
        if module.device.type == "cuda" and not last and not self._prepared:
            self._prepared = True
            self.writer.prepare(module.device, *self._tensors(trainer, module))
        if last or step % self.config.every_steps == 0:
            self._save(trainer, module)
            if last or not self.config.asynchronous:
                self._finish(last)
        self.stop_if_told(trainer, module, guard_of(trainer).signal)

    def on_validation_batch_end(self, trainer, module, *arguments) -> None:
        """A validation is left when told to stop; the resumed run repeats it."""
        self.stop_if_told(trainer, module, trainer.strategy.agree_on_signal())

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Data that comes to its end is read again; where that gives nothing, it is over."""
        before, self._n_batch = self._n_batch, 0
        if before or self.step == trainer.max_steps or trainer.should_stop:
            return
        if self.saved_step != self.step:
            self._save(trainer, module)
        self._finish(True)
        raise UserError(
            f"the data came to its end at step {self.step} of {trainer.max_steps}, which is saved: "
            "give more of it, and the same command goes on"
        )

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Saves what something else has ended, a callback or trainer.max_time, and notes it."""
        if self.step == trainer.max_steps:
            return
        if self.saved_step != self.step:
            self._save(trainer, module)
        self._finish(True)
        if not trainer.should_stop or not self.step:
            return
        planned = trainer.max_steps
        end_here(trainer)
        if trainer.is_global_zero:
            by = _who_stopped(trainer)
            say(f"ended early by {by}, at step {self.step} of {planned}")
            found = {"step": self.step, "of": planned, "by": by}
            write_file(self.run.ended_file, json.dumps(found) + "\n")

    def on_exception(self, trainer: Trainer, module: LightningModule, exception) -> None:
        """Lets a checkpoint be finished, and saves the last step where its state is whole.

        Several ranks save together, and the others do not know of this one's exception.
        """
        if self.writer is None:
            return
        self.writer.wait(quietly=True)
        if self.writer.complete != self.saved_step:
            self.saved_step = self.writer.complete or 0
        if isinstance(exception, preemption.Preempted) or trainer.world_size > 1:
            return
        if trainer.state.fn != "fit" or (not trainer.training and not trainer.validating):
            return
        if trainer.global_step == self.step + 1:
            # The step was taken, and whoever failed was told of it first.
            self.step, self._kept = trainer.global_step, None
        elif self._kept is None or self._kept[0] != self.step or self._stepping:
            return
        if not self.step or self.saved_step == self.step:
            return
        try:
            self._save(trainer, module)
            self._finish(True)
            say(f"saved step {self.step}, the last one before what follows")
        except Exception as error:
            say(f"warning: step {self.step} could not be saved: {error}")

    def _keep(self, trainer: Trainer, module: LightningModule) -> None:
        """Keeps what a checkpoint of this step boundary needs besides the tensors."""
        self._kept = self._state(trainer, module)

    def _state(self, trainer: Trainer, module: LightningModule) -> tuple[int, dict, tuple]:
        return trainer.global_step, dump_state(trainer), capture_random(module.device)

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        step, rest, captured = self._kept or self._state(trainer, module)
        self._finish(False)
        self.writer.start(step, *self._tensors(trainer, module, captured), rest, self._prune)
        self.saved_step = step

    def _tensors(
        self, trainer: Trainer, module: LightningModule, captured: tuple | None = None
    ) -> tuple[State, State]:
        """Weights; states of the optimizer and of the random generators."""
        random = random_state(trainer.global_rank, module.device, captured)
        # After a validation batch some parameters are still whole.
        reshard(module.model)
        optimizer = optimizer_state_of(module.model, trainer.optimizers[0])
        return weights_of(module.model), optimizer | random

    def _finish(self, must_succeed: bool) -> None:
        """Waits for the checkpoint being written; some may fail, but not the last one."""
        try:
            if self.writer.wait():
                self.n_failed = 0
        except UserError as error:
            self.n_failed += 1
            self.saved_step = self.writer.complete or 0
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
            if code == preemption.INTERRUPTED:
                say(f"interrupted: the same command continues {self.run} from step {self.step}")
            else:
                why = preemption.reason(code)
                say(f"stopped at step {self.step} ({why}): the same command continues {self.run}")
        launched_by_us = not trainer.strategy.cluster_environment.creates_processes_externally
        # Lightning kills everything when a process that it started exits with a code.
        raise preemption.Preempted(0 if launched_by_us and trainer.local_rank else code)

    def _prune(self) -> None:
        prune(self.run.path, self.config.keep_last, self.config.keep_every, self.writer.writing)


def _who_stopped(trainer: Trainer) -> str:
    """What has set trainer.should_stop, as far as it can be told."""
    for callback in trainer.callbacks:
        if isinstance(callback, Timer) and (callback.time_remaining() or 1) <= 0:
            return "trainer.max_time"
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping ({' '.join(callback.stopping_reason_message.split())})"
    return "a callback"
