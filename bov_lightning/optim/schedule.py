"""Learning rate, Muon momentum and weight decay as functions of the step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bov_lightning.optim.config import OptimizerConfig


def lr_factor(step: int, n_step: int, config: OptimizerConfig) -> float:
    """Factor on all learning rates at ``step`` of ``n_step``: warm-up, constant, warm-down."""
    warmdown = round(config.warmdown_fraction * n_step)
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if step <= n_step - warmdown:
        return 1.0
    final = config.final_lr_fraction
    return final + (1 - final) * max(0, n_step - step) / warmdown


def muon_momentum(step: int, n_step: int, config: OptimizerConfig) -> float:
    """0.85 rising to 0.97 over 400 steps, then falling to 0.90 over the warm-down."""
    warmdown = round(config.warmdown_fraction * n_step)
    start = n_step - warmdown
    if step < 400:
        return 0.85 + 0.12 * step / 400
    if step < start or not warmdown:
        return 0.97
    progress = min(1.0, (step - start) / warmdown)
    return 0.97 * (1 - progress) + 0.90 * progress


def weight_decay_factor(step: int, n_step: int) -> float:
    """Factor on Muon's weight decay: half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(step, n_step) / n_step))


class TrainingSchedule(LRScheduler):
    """Sets learning rate, Muon momentum and weight decay before each optimizer step.

    Everything follows from the step and the horizon, so the state to resume from is the step alone.
    """

    def __init__(self, optimizer: Optimizer, n_step: int, config: OptimizerConfig):
        """``n_step``: optimizer steps of the whole run."""
        self.n_step, self.config = n_step, config
        for group in optimizer.param_groups:
            group.setdefault("initial_weight_decay", group["weight_decay"])
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """The learning rate of each group at the current step; sets the other two on the way."""
        step = self.last_epoch
        for group in self.optimizer.param_groups:
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(step, self.n_step, self.config)
                factor = weight_decay_factor(step, self.n_step)
                group["weight_decay"] = factor * group["initial_weight_decay"]
        factor = lr_factor(step, self.n_step, self.config)
        return [factor * lr for lr in self.base_lrs]

    def state_dict(self) -> dict:
        """The step."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues at the stored step, under this run's horizon and learning rates."""
        self.last_epoch = state_dict["last_epoch"]
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
