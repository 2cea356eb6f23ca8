"""Run directories: what a run leaves behind, and how it is found again.

runs/NAME/
    config.yaml     the resolved recipe
    run.json        versions, git commit, data fingerprint, parameter and FLOP figures
    tokenizer/
    checkpoints/    see bov_lightning.checkpoint.directory
    metrics.csv
    events.out.*    TensorBoard
"""

import hashlib
import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from bov_lightning import __version__
from bov_lightning.checkpoint import directory as checkpoints
from bov_lightning.checkpoint import writing as saving
from bov_lightning.console import say
from bov_lightning.distributed import preemption
from bov_lightning.distributed.sharding import reshard
from bov_lightning.errors import UserError
from bov_lightning.files import remove
from bov_lightning.recipe.sections import CheckpointConfig, ValidationConfig
from bov_lightning.run.loggers import RunLogger
from bov_lightning.training.callbacks.guard import control_of

PACKAGES = ("torch", "lightning", "tokenizers", "numpy")


def git_commit() -> str | None:
    """The commit of the source checkout that runs; None when it is installed without one."""
    folder = Path(__file__).parent.parent
    if not (folder.parent / ".git").exists():
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


class RunFiles(Callback):
    """Writes config.yaml, run.json and the tokenizer when training starts."""

    def __init__(self, directory: Path, config_yaml: str, figures: dict[str, Any]):
        self.directory, self.config_yaml, self.figures = directory, config_yaml, figures

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """The first moment at which data and model are known to fit."""
        if not trainer.is_global_zero:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "config.yaml").write_text(self.config_yaml, encoding="utf-8")
        for logger in trainer.loggers:  # those that a recipe adds to ours
            logger.log_hyperparams(yaml.safe_load(self.config_yaml))
        data = trainer.datamodule
        tokenizer = self.directory / checkpoints.TOKENIZER
        shutil.copytree(data.tokenizer_directory, tokenizer, dirs_exist_ok=True)
        content = {
            "versions": {
                "bov-lightning": __version__,
                "python": sys.version.split()[0],
                **{name: metadata.version(name) for name in PACKAGES},
            },
            "git_commit": git_commit(),
            "device": str(module.device),
            "world_size": trainer.world_size,
            "data": data.fingerprint,
            **self.figures,
        }
        (self.directory / "run.json").write_text(json.dumps(content, indent=1) + "\n")


class Checkpointer(Callback):
    """Resumes a run, writes step-numbered checkpoints, and stops at a step boundary when told to.

    A checkpoint holds the state at a step boundary. Where a validation follows the boundary, that
    state is kept until the next one, so that a signal during validation loses nothing either.
    """

    failures_allowed = 2
    """Saves in a row that may fail before training stops: disks fill up, and are cleaned up."""

    def __init__(
        self, run: Path, config: CheckpointConfig, validation: ValidationConfig, resume: bool
    ):
        """
        Args:
            run: the run directory.
            config: when to save and what to keep.
            validation: when validations follow.
            resume: whether to continue from the newest complete checkpoint.
        """
        self.run, self.config, self.validation, self.resume = run, config, validation, resume
        self.config_yaml = ""
        self.writer: saving.CheckpointWriter | None = None
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
        ranks = saving.Ranks(trainer.strategy.new_group())
        self.writer = saving.CheckpointWriter(self.run, self.config_yaml, ranks)
        if not self.resume:
            return
        checkpoint, rest, messages = saving.restore(
            self.run, module.model, trainer.optimizers[0], ranks, module.device
        )
        if trainer.is_global_zero:
            for message in messages:
                say(message)
        if checkpoint is not None:
            self.saved_step = self.step = self.writer.complete = rest["global_step"]
            for logger in trainer.loggers:
                if isinstance(logger, RunLogger):
                    logger.resume_at(self.step)
            # Lightning restores its loops, schedules and callbacks from this right after the hook.
            trainer._checkpoint_connector._loaded_checkpoint = rest

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Stops if a signal came before the first step; validates what was to be validated."""
        self.stop_if_told(trainer, module, trainer.strategy.agree_on_signal())
        step = trainer.global_step
        missing = step > 0 and step % self.validation.every_steps == 0
        missing = missing and "val_bpb" not in trainer.loggers[0].rows.get(step, {})
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
        self.stop_if_told(trainer, module, control_of(trainer).signal)

    def on_validation_batch_end(self, trainer, module, *arguments) -> None:
        """A validation is left when told to stop; the resumed run repeats it."""
        self.stop_if_told(trainer, module, trainer.strategy.agree_on_signal())

    def on_exception(self, trainer: Trainer, module: LightningModule, exception) -> None:
        """Lets a checkpoint that is being written be finished."""
        if self.writer is not None:
            self.writer.wait(quietly=True)

    def _state(self, trainer: Trainer, module: LightningModule) -> tuple[int, dict, dict]:
        rest = trainer._checkpoint_connector.dump_checkpoint()
        for emptied in ("state_dict", "optimizer_states"):
            rest.pop(emptied)
        return trainer.global_step, rest, saving.random_state(trainer.global_rank, module.device)

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        step, rest, random = self._kept or self._state(trainer, module)
        self._finish(False)
        # After a validation batch some parameters are still whole.
        reshard(module.model)
        optimizer = saving.optimizer_state_of(module.model, trainer.optimizers[0])
        weights = saving.weights_of(module.model)
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
        found = checkpoints.complete_checkpoints(self.run)
        for path in found[: -self.config.keep_last]:
            step = checkpoints.step_of(path)
            if not self.config.keep_every or step % self.config.keep_every:
                # Renamed first: a half-deleted directory must not pass for a checkpoint.
                doomed = path.with_name(f".{path.name}.old")
                remove(doomed)
                remove(path.rename(doomed))


def validate_now(trainer: Trainer) -> None:
    """Runs the validation loop inside `fit`, as Lightning does between two batches."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
