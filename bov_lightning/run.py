"""Run directories: what a run leaves behind, and how it is found again.

runs/NAME/
    config.yaml     the resolved recipe
    run.json        versions, git commit, data fingerprint, parameter and FLOP figures
    tokenizer/
    checkpoints/    see bov_lightning.checkpoint
    metrics.csv
    events.out.*    TensorBoard
"""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from bov_lightning import __version__
from bov_lightning import checkpoint as checkpoints
from bov_lightning.recipe import CheckpointConfig

PACKAGES = ("torch", "lightning", "tokenizers", "numpy")


def git_commit() -> str | None:
    """The commit of the source checkout that runs; None when it is installed without one."""
    folder = Path(__file__).parent
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


class DirectoryCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as the directories of `bov_lightning.checkpoint`."""

    def __init__(self, run: Path, config_yaml: str):
        self.run, self.config_yaml = run, config_yaml

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Writes weights and everything else apart, complete or absent."""
        rest = dict(checkpoint)
        weights = {
            name.removeprefix("model."): tensor for name, tensor in rest.pop("state_dict").items()
        }
        tokenizer = self.run / checkpoints.TOKENIZER
        checkpoints.write_checkpoint(
            Path(path),
            checkpoint["global_step"],
            weights,
            self.config_yaml,
            training_state=rest,
            tokenizer=tokenizer if tokenizer.is_dir() else None,
        )

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        """Puts them together again; runs no code from the files."""
        weights = checkpoints.read_weights(Path(path))
        state = checkpoints.read_training_state(Path(path))
        state["state_dict"] = {f"model.{name}": tensor for name, tensor in weights.items()}
        return state

    def remove_checkpoint(self, path) -> None:
        """Deletes the directory."""
        shutil.rmtree(path, ignore_errors=True)


class Checkpointer(Callback):
    """Writes step-numbered checkpoints at step boundaries and at the end, and prunes old ones."""

    def __init__(self, run: Path, config: CheckpointConfig):
        self.run, self.config = run, config
        self.saved_step = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """A resumed run need not save what it was resumed from."""
        self.saved_step = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """Saves when a due step has just been taken."""
        step = trainer.global_step
        due = step % self.config.every_steps == 0 or step == trainer.max_steps
        if due and step != self.saved_step:
            self.saved_step = step
            target = self.run / "checkpoints" / checkpoints.step_name(step)
            trainer.save_checkpoint(target)
            if trainer.is_global_zero:
                self._prune()

    def _prune(self) -> None:
        found = checkpoints.complete_checkpoints(self.run)
        for path in found[: -self.config.keep_last]:
            step = int(path.name.removeprefix("step-"))
            if not self.config.keep_every or step % self.config.keep_every:
                # Renamed first: a half-deleted directory must not pass for a checkpoint.
                doomed = path.with_name(f".{path.name}.partial")
                shutil.rmtree(doomed, ignore_errors=True)
                shutil.rmtree(path.rename(doomed))
