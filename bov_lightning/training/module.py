"""The LightningModule: loss, bits per byte, optimizer and schedule."""

from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bov_lightning.distributed.host_tables import (
    TablesOnHost,
    host_parameters,
    keep_tables_on_host,
)
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.distributed.sharding import recompute_activations, write_part
from bov_lightning.distributed.strategy import ControlGroup, ShardedStrategy
from bov_lightning.errors import UserError
from bov_lightning.model.layers import Initialiser
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW
from bov_lightning.optim.schedule import TrainingSchedule
from bov_lightning.recipe.budget import horizon
from bov_lightning.recipe.sections import Recipe
from bov_lightning.training.fp8 import check_fp8_device, use_fp8
from bov_lightning.training.internals import count_steps_in_micro_batches, trainer_of
from evaluation.bits_per_byte import BitsPerByte


class BoVModule(pl.LightningModule):
    """Trains a `Transformer` on rows of T+1 token ids and measures bits per byte.

    The DataModule must have ``vocab_size`` and ``token_bytes`` (UTF-8 bytes per token id).
    """

    def __init__(self, recipe: Recipe):
        """``recipe``: what is trained; its budget is not needed to validate."""
        super().__init__()
        self.recipe, self.config = recipe, recipe.model.config
        self.batch_tokens = recipe.batch.tokens
        self.model: Transformer | None = None
        self.tables_on_host: TablesOnHost | None = None
        self.bits_per_byte = BitsPerByte()
        self.token_bytes: Tensor | None = None
        self.train_loss: Tensor | float = 0.0
        """Mean loss in nats per token of the micro-batches since the last optimizer step."""

    @property
    def n_step(self) -> int:
        """Optimizer steps of the whole run."""
        return horizon(self.recipe.model.budget, self.config, self.batch_tokens)

    def setup(self, stage: str) -> None:
        """Checks that data and network speak of the same token ids."""
        data = self.trainer.datamodule
        if data.vocab_size != self.config.vocab_size:
            raise UserError(
                f"model.config.vocab_size is {self.config.vocab_size}, but the data's tokenizer "
                f"has {data.vocab_size} token ids: set one of them to the other"
            )
        start, theirs = self.config.document_start, getattr(data, "document_start", None)
        # What an older run was trained with can still be measured.
        if stage == "fit" and start is not None and theirs is not None and start != theirs:
            raise UserError(
                f"model.config.document_start is {start}, but the token that the data puts in "
                f"front of documents is id {theirs}: set it to that, or to null"
            )
        self.token_bytes = data.token_bytes

    def configure_model(self) -> None:
        """Builds the network, once."""
        if self.model is not None:
            return
        recipe, trainer = self.recipe, trainer_of(self)
        strategy = None if trainer is None else trainer.strategy
        sharded, on_host = isinstance(strategy, ShardedStrategy), recipe.tables_on == "host"
        with torch.device("meta") if sharded or on_host else nullcontext():
            self.model = Transformer(self.config, recipe.seed)
        if on_host:
            self._keep_tables_on_host(strategy)
        if recipe.fp8 and trainer is not None:
            check_fp8_device(strategy.root_device)
            use_fp8(self.model)
        if recipe.activation_checkpointing:
            recompute_activations(self.model)
        if recipe.compile:
            self.model.compile_blocks()
        if sharded:
            strategy.build(self.model, recipe.seed)
        elif on_host:
            self.model.to_empty(device="cpu")
            self.model.initialise(Initialiser(recipe.seed, write_part))
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._show_text(trainer.datamodule)

    def _keep_tables_on_host(self, strategy: ControlGroup | None) -> None:
        ranks = Ranks() if strategy is None else strategy.new_ranks()
        dtype = getattr(strategy, "param_dtype", None)
        self.tables_on_host = keep_tables_on_host(self.model, ranks, dtype)
        names = [f"model.{name}" for name in host_parameters(self.model)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def _show_text(self, data: pl.LightningDataModule) -> None:
        """Shows training text to a value source that learns from it; all ranks the same."""
        source = self.model.lookup_source
        if not source.learns_from:
            return
        if not hasattr(data, "sample_rows"):
            raise UserError(
                f"value.source {self.config.value.source} learns from training text before a run "
                f"begins, which {type(data).__name__} cannot show: use "
                "data_modules.PackedDataModule, or settings of the source that need none "
                "(of ngram_bank, frequent: 0)"
            )
        rows = data.sample_rows(source.learns_from)
        self.model.learn(rows.to(self.model.embedding.weight.device))

    def training_step(self, rows: Tensor, batch_index: int) -> Tensor:
        """Mean loss in nats per token of rows (micro, T+1)."""
        loss = self.model(rows[:, :-1], rows[:, 1:])
        n_micro = self.trainer.accumulate_grad_batches
        first = batch_index % n_micro == 0
        self.train_loss = loss.detach() / n_micro + (0.0 if first else self.train_loss)
        return loss

    def validation_step(self, rows: Tensor, batch_index: int) -> None:
        """Adds rows (up to micro, T+1) to the bits per byte."""
        targets = rows[:, 1:]
        nats = self.model(rows[:, :-1], targets, reduction="none")
        self.token_bytes = self.token_bytes.to(targets.device)
        self.bits_per_byte.update(nats, self.token_bytes[targets])

    def on_validation_epoch_end(self) -> None:
        """Reports val_bpb."""
        self.log("val_bpb", self.bits_per_byte.compute().float(), logger=False)
        self.bits_per_byte.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        """Muon and AdamW, under the paper's schedules."""
        settings = self.recipe.model.optimizer
        groups = build_groups(self.model, settings, self.config, self.batch_tokens)
        optimizer = MuonAdamW(groups, self.tables_on_host)
        schedule = TrainingSchedule(optimizer, self.n_step, settings)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counts the finished steps in this run's micro-batches: accumulation may have changed."""
        count_steps_in_micro_batches(checkpoint, self.trainer.accumulate_grad_batches)
