"""Where this project touches Lightning's private parts: the file to open at its upgrades.

Each function says why it is needed. A name that Lightning no longer has is an error here and now,
since Python would accept an assignment to it in silence.
"""

import logging
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from bov_lightning.upstream import require

# `RecipeCLI` overrides it: the last place at which arguments that follow from others can be set.
require(LightningCLI, "_instantiate_trainer")


def quiet_lightning() -> None:
    """Leaves the screen to the run's own lines; warnings about what we decide are not news."""
    for name, level in (
        ("lightning.pytorch", logging.WARNING),
        ("lightning.fabric", logging.WARNING),
        # gloo has no all-to-all; its replacement is announced by every rank.
        ("torch.distributed.tensor._collective_utils", logging.ERROR),
    ):
        logging.getLogger(name).setLevel(level)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*is not a subclass of.*DataLoader.*",
        ".*LightningCLI's args parameter is intended.*",
        ".*is smaller than the logging interval.*",
        ".*It is recommended to use `self.log\\('val_bpb'.*",  # the metric reduces it
        ".*GPU available but not used.*",
        ".*`srun` command is available on your system.*",  # distributed.processes says it
        ".*torch.distributed is disabled, unavailable or uninitialized.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def leave_signals_to_us(trainer: Trainer) -> None:
    """Lightning would replace our handlers, and have all ranks talk in every micro-batch."""
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    require(connector, "register_signal_handlers")
    require(loop, "_broadcast_sigterm_tensor")
    connector.register_signal_handlers = lambda: None
    loop._broadcast_sigterm_tensor = lambda: None


def set_lengths(trainer: Trainer, n_micro: int, n_step: int, validate_every: int) -> None:
    """What only a Trainer that is there can tell: it knows the number of devices.

    Args:
        trainer: not yet fitting.
        n_micro: micro-steps per optimizer step.
        n_step: optimizer steps of the whole run.
        validate_every: optimizer steps between validations.
    """
    loop = trainer.fit_loop.epoch_loop
    require(trainer, "accumulate_grad_batches", "val_check_interval")
    require(loop, "max_steps")
    trainer.accumulate_grad_batches = n_micro
    loop.max_steps = n_step
    trainer.val_check_interval = validate_every * n_micro


def stop_only_after(trainer: Trainer, step: int) -> None:
    """Has whatever asks to stop (`trainer.should_stop`) wait until ``step`` steps are taken.

    Lightning would leave a step between two micro-batches, whose data was then lost.
    """
    loop = trainer.fit_loop.epoch_loop
    require(loop, "min_steps")
    require(trainer.fit_loop, "_can_stop_early")
    loop.min_steps = step


def end_here(trainer: Trainer) -> None:
    """The step that has just been taken is the last one, for everybody who asks."""
    loop = trainer.fit_loop.epoch_loop
    require(loop, "max_steps")
    loop.max_steps = trainer.global_step


def call_last(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Puts callbacks behind those that Lightning has added, such as that of trainer.max_time."""
    trainer.callbacks = [x for x in trainer.callbacks if x not in callbacks] + callbacks


def validate_now(trainer: Trainer) -> None:
    """Runs the validation loop inside `fit`, as Lightning does between two batches."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    require(loop, "restarting", "run")
    require(trainer, "validating", "training")
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


def dump_state(trainer: Trainer) -> dict[str, Any]:
    """Schedules, loops and callbacks as Lightning stores them, without weights and optimizer."""
    state = trainer._checkpoint_connector.dump_checkpoint()
    for emptied in ("state_dict", "optimizer_states"):
        state.pop(emptied)
    return state


def hand_over_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Has Lightning restore what `dump_state` gave, right after the hook ``on_fit_start``."""
    connector = trainer._checkpoint_connector
    require(connector, "_loaded_checkpoint")
    connector._loaded_checkpoint = state


def count_steps_in_micro_batches(state: dict[str, Any], n_micro: int) -> None:
    """Counts the finished steps of a stored state in this run's micro-batches.

    The accumulation may have changed since.
    """
    n_batch = state["global_step"] * n_micro
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        # The checkpoint was written in on_train_batch_end, before `completed` is counted.
        behind = counts["ready"] - counts["completed"]
        counts.update(ready=n_batch, started=n_batch, processed=n_batch)
        counts["completed"] = n_batch - behind


def trainer_of(module: LightningModule) -> Trainer | None:
    """The module's Trainer; None where it has none, which the public property refuses to say."""
    require(module, "_trainer")
    return module._trainer
