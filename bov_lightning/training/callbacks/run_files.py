"""Writes config.yaml, run.json, the tokenizer and somebody's own code of a run."""

import json
import os
import shutil
import sys
from importlib import metadata
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from bov_lightning.run.directory import RunDirectory, git_commit
from bov_lightning.run.own_code import keep
from bov_lightning.version import __version__

PACKAGES = ("torch", "lightning", "tokenizers", "numpy")


class RunFiles(Callback):
    """Writes config.yaml, run.json and the tokenizer when training starts."""

    def __init__(self, run: RunDirectory, config_yaml: str, source: str, figures: dict[str, Any]):
        """``source``: the value source; ``figures``: more for run.json."""
        self.run, self.config_yaml, self.figures = run, config_yaml, figures
        self.source = source

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """The first moment at which data and model are known to fit."""
        if not trainer.is_global_zero:
            return
        self.run.path.mkdir(parents=True, exist_ok=True)
        self.run.config.write_text(self.config_yaml, encoding="utf-8")
        if logger_id := os.environ.get("WANDB_RUN_ID"):
            self.run.logger_id_file.write_text(f"{logger_id}\n", encoding="utf-8")
        for logger in trainer.loggers:  # those that a recipe adds to ours
            logger.log_hyperparams(yaml.safe_load(self.config_yaml))
        data = trainer.datamodule
        shutil.copytree(data.tokenizer_directory, self.run.tokenizer, dirs_exist_ok=True)
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
            **keep(self.source, self.run),
            **self.figures,
        }
        self.run.facts_file.write_text(json.dumps(content, indent=1) + "\n")
