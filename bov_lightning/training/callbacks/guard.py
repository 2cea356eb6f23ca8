"""What all ranks know at each step boundary: the mean loss, its health, and whether to stop."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from bov_lightning.console import say
from bov_lightning.errors import DivergedError
from bov_lightning.recipe.sections import GuardConfig


class LossGuard(Callback):
    """Agrees with the other ranks once per optimizer step, and guards the loss.

    Attributes:
        loss: mean training loss of the last step over all ranks, nats per token.
        signal: exit code that a signal asks for, on whichever rank it came; 0 without one.
        n_spike: steps so far whose loss stood out.
        n_skipped: steps so far that were skipped.
        n_skipped_in_row: how many of them were the last ones.
    """

    state_key = "Control"
    """By which training.pt of all versions keeps what the guard has learned."""
    kept = ("n_spike", "n_skipped", "n_skipped_in_row", "n_seen", "mean", "variance")
    memory = 100
    """Steps over which mean and deviation of the loss are taken, with exponential weights."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self.loss, self.signal, self.n_spike = math.nan, 0, 0
        self.step = self.n_seen = self.n_skipped = self.n_skipped_in_row = 0
        self.mean = self.variance = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What the guard has learned."""
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with it."""
        vars(self).update(state_dict)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Counts from here."""
        self.step, optimizer = trainer.global_step, trainer.optimizers[0]
        optimizer.n_skipped, optimizer.n_skipped_in_row = self.n_skipped, self.n_skipped_in_row

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """Agrees, and looks at the loss, when a step has just been taken."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        self.loss, self.signal = trainer.strategy.agree(float(module.train_loss))
        optimizer = trainer.optimizers[0]
        self.n_skipped, self.n_skipped_in_row = optimizer.n_skipped, optimizer.n_skipped_in_row
        if self.n_skipped_in_row:
            self._skipped(trainer)
        elif self._is_spike():
            self.n_spike += 1
            self._say(
                trainer,
                f"warning: the loss at step {self.step} is {self.loss:.4f}, after a mean of "
                f"{self.mean:.4f} (gradient norm {optimizer.gradient_norm:.3g})",
            )

    def _skipped(self, trainer: Trainer) -> None:
        if self.n_skipped_in_row >= self.config.max_skipped_steps:
            raise DivergedError(
                f"the gradients of {self.n_skipped_in_row} steps in a row, up to step {self.step}, "
                "are not finite: lower the learning rates (model.optimizer) or look at the data "
                "there; guard.max_skipped_steps is the limit"
            )
        self._say(
            trainer,
            f"warning: step {self.step} is skipped, its gradients are not finite "
            f"({self.n_skipped_in_row} in a row, {self.n_skipped} in all)",
        )

    def _is_spike(self) -> bool:
        """Whether the loss stands out; takes it into mean and deviation if not."""
        deviation = math.sqrt(self.variance)
        if self.n_seen >= self.memory and (
            self.loss > self.mean + self.config.spike_deviations * deviation
        ):
            return True
        self.n_seen += 1
        weight = max(1 / self.n_seen, 1 / self.memory)
        off = self.loss - self.mean
        self.mean += weight * off
        self.variance = (1 - weight) * (self.variance + weight * off * off)
        return False

    def _say(self, trainer: Trainer, text: str) -> None:
        if trainer.is_global_zero:
            say(text)


def guard_of(trainer: Trainer) -> LossGuard:
    """The trainer's `LossGuard`."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, LossGuard))
