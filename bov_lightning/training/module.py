"""The LightningModule: loss, bits per byte, optimizer and schedule."""

from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from bov_lightning.distributed.sharding import recompute_activations
from bov_lightning.distributed.strategy import ShardedStrategy
from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim.groups import OptimizerConfig, build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW
from bov_lightning.optim.schedule import TrainingSchedule
from bov_lightning.recipe.budget import BudgetConfig, horizon
from bov_lightning.training.fp8 import check_fp8_device, use_fp8
from evaluation.bits_per_byte import BitsPerByte


class BoVModule(pl.LightningModule):
    """Trains a `Transformer` on rows of T+1 token ids and measures bits per byte.

    The DataModule must have ``vocab_size`` and ``token_bytes`` (UTF-8 bytes per token id).
    """

    def __init__(
        self,
        config: TransformerConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),
        budget: BudgetConfig | None = None,
        batch_tokens: int = 524288,
        seed: int = 0,
        compile: bool = False,
        activation_checkpointing: bool = False,
        fp8: bool = False,
    ):
        """
        Args:
            config: the network's shape.
            optimizer: learning rates, weight decay, schedule.
            budget: how long to train; not needed to validate.
            batch_tokens: tokens per optimizer step; filled from batch.tokens.
            seed: seed of the initialisation; filled from seed.
            compile: compile each block; filled from compile.
            activation_checkpointing: recompute activations; filled from activation_checkpointing.
            fp8: multiply in fp8 in the blocks; filled from fp8.
        """
        super().__init__()
        self.config, self.optimizer_config, self.budget = config, optimizer, budget
        self.batch_tokens, self.seed = batch_tokens, seed
        self.compile_blocks, self.recompute_blocks = compile, activation_checkpointing
        self.fp8 = fp8
        self.model: Transformer | None = None
        self.bits_per_byte = BitsPerByte()
        self.token_bytes: Tensor | None = None
        self.train_loss: Tensor | float = 0.0
        """Mean loss in nats per token of the micro-batches since the last optimizer step."""

    @property
    def n_step(self) -> int:
        """Optimizer steps of the whole run."""
        if self.budget is None:
            raise UserError(
                "model.budget is not set: give flops, tokens, tokens_per_param or steps"
            )
        return horizon(self.budget, self.config, self.batch_tokens)

    def setup(self, stage: str) -> None:
        """Checks that data and network speak of the same token ids."""
        data = self.trainer.datamodule
        if data.vocab_size != self.config.vocab_size:
            raise UserError(
                f"model.config.vocab_size is {self.config.vocab_size}, but the data's tokenizer "
                f"has {data.vocab_size} token ids: set one of them to the other"
            )
        self.token_bytes = data.token_bytes

    def configure_model(self) -> None:
        """Builds the network, once."""
        if self.model is not None:
            return
        strategy = None if self._trainer is None else self.trainer.strategy
        sharded = isinstance(strategy, ShardedStrategy)
        with torch.device("meta") if sharded else nullcontext():
            self.model = Transformer(self.config, self.seed)
        if self.fp8 and self._trainer is not None:
            check_fp8_device(strategy.root_device)
            use_fp8(self.model)
        if self.recompute_blocks:
            recompute_activations(self.model)
        if self.compile_blocks:
            for block in self.model.blocks:
                block.compile()
        if sharded:
            strategy.build(self.model, self.seed)

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
        groups = build_groups(self.model, self.optimizer_config, self.config, self.batch_tokens)
        optimizer = MuonAdamW(groups)
        schedule = TrainingSchedule(optimizer, self.n_step, self.optimizer_config)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counts the finished steps in this run's micro-batches: accumulation may have changed."""
        n_batch = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            # The checkpoint was written in on_train_batch_end, before `completed` is counted.
            behind = counts["ready"] - counts["completed"]
            counts.update(ready=n_batch, started=n_batch, processed=n_batch)
            counts["completed"] = n_batch - behind
