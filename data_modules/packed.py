"""Training on a corpus that was packed beforehand, in one global order."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from bov_lightning.errors import UserError
from bov_lightning.kinds import COUNT, PATH, SEED, Range
from data_modules.corpus import Corpus, Rows, total_counts
from data_modules.order import rows_at
from data_modules.packing import PackingConfig
from data_modules.reader import OnError
from data_modules.sources import TextSource
from data_modules.tokenizer import TokenizerConfig, bos_id, read_tokenizer, token_bytes


class TrainingRows:
    """Micro-batches (micro, T+1), int64, of this rank, from any position of the global order.

    The order is a function of the seed alone. Position counts samples over all ranks, so it means
    the same whatever the number of ranks, the micro-batch and the accumulation are.
    """

    def __init__(self, rows: Rows, micro: int, n_batch: int, seed: int, rank: int, world: int):
        """``n_batch``: micro-batches of the whole run, per rank."""
        self.rows, self.micro, self.n_batch, self.seed = rows, micro, n_batch, seed
        self.rank, self.world = rank, world
        self.position = 0

    def __len__(self) -> int:
        return self.n_batch

    def __iter__(self) -> Iterator[Tensor]:
        chunk = self.micro * self.world
        while self.position // chunk < self.n_batch:
            first = self.position + self.rank * self.micro
            self.position += chunk
            samples = np.arange(first, first + self.micro)
            rows = self.rows.read(rows_at(samples, len(self.rows), self.seed))
            yield torch.from_numpy(rows.astype(np.int64))

    def state_dict(self) -> dict:
        """The global position, and what it is a position in."""
        return {"samples": self.position, "seed": self.seed, "rows": self.rows.fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Continues at a stored position; another seed or corpus is a `UserError`."""
        for name, own in (("seed", self.seed), ("rows", self.rows.fingerprint)):
            if state.get(name) != own:
                raise UserError(
                    f"the checkpoint was trained with {name} {state.get(name)} of data, now {own}: "
                    "its position means nothing there; use a new run.name or --resume never"
                )
        self.position = state["samples"]


class ValidationRows:
    """Micro-batches (up to micro, T+1), int64, of this rank's share of the first ``n_row`` rows.

    Every rank gives equally many batches of equal sizes, as sharded models need: where its share is
    shorter, rows of nothing but document starts fill up, which count no bytes and no loss.
    """

    def __init__(self, rows: Rows, n_row: int, micro: int, filler: int, rank: int, world: int):
        self.rows, self.micro, self.filler = rows, micro, filler
        self.indices = np.arange(rank, n_row, world)
        self.n_share = -(-n_row // world)

    def __len__(self) -> int:
        return -(-self.n_share // self.micro)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.n_share, self.micro):
            size = min(self.micro, self.n_share - start)
            batch = np.full((size, self.rows.row_len), self.filler, dtype=np.int64)
            rows = self.rows.read(self.indices[start : start + size])
            batch[: len(rows)] = rows
            yield torch.from_numpy(batch)


class CorpusDataModule(pl.LightningDataModule):
    """What every DataModule on a `Corpus` shares: preparation, tokenizer, validation."""

    def __init__(self, corpus: Corpus, micro: int, seed: int, validation_tokens: int | None):
        super().__init__()
        # All nodes share the directory, so one process of the run makes it, not one per node.
        self.prepare_data_per_node = False
        self.corpus, self.micro, self.seed = corpus, micro, seed
        self.validation_tokens = validation_tokens
        self.manifest: dict = {}

    @property
    def tokenizer_directory(self) -> Path:
        """The tokenizer, as ``transformers`` reads it."""
        return self.corpus.tokenizer_directory

    def prepare_data(self) -> None:
        """Makes what is missing in the corpus directory."""
        if self.corpus.is_prepared():
            self.corpus.say_what_is_shared()
        else:
            self.corpus.prepare()

    def setup(self, stage: str) -> None:
        """Opens the rows."""
        self.manifest = self.corpus.read_manifest()
        tokenizer = read_tokenizer(self.tokenizer_directory)
        self.token_bytes = torch.from_numpy(token_bytes(tokenizer))
        self.document_start = bos_id(tokenizer)
        self.val_rows = self.corpus.open_rows("val", self.manifest)

    @property
    def vocab_size(self) -> int:
        """Token ids of the tokenizer."""
        return self.manifest["vocab_size"]

    @property
    def fingerprint(self) -> dict[str, str]:
        """What identifies the text and the tokenizer behind a measured bits per byte."""
        return {
            "source": self.manifest["settings"]["fingerprint"],
            "tokenizer": self.manifest["tokenizer_hash"],
            "val_rows": self.manifest["shards"]["val"][0]["sha256"][:16],
        }

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        """Pins rows that go to a GPU: copying others would wait until it has done all its work."""
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return batch.pin_memory() if on_gpu else batch

    def val_dataloader(self) -> ValidationRows:
        """The held-out rows, or the first of them that hold validation_tokens."""
        n_row = len(self.val_rows)
        if self.validation_tokens is not None:
            n_row = min(n_row, -(-self.validation_tokens // self.corpus.sequence_len))
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return ValidationRows(self.val_rows, n_row, self.micro, self.document_start, rank, world)


class PackedDataModule(CorpusDataModule):
    """Tokenizes and packs a corpus once, then serves it in one global order."""

    def __init__(
        self,
        directory: Annotated[str, PATH],
        source: TextSource,
        tokenizer: TokenizerConfig = TokenizerConfig(),
        packing: PackingConfig = PackingConfig(),
        n_shard: Annotated[int, Range(1, 1_000_000)] = 16,
        on_error: OnError = "error",
        sequence_len: Annotated[int, Range(1, 2**24)] = 2048,
        micro: Annotated[int, COUNT] = 16,
        seed: Annotated[int, SEED] = 0,
        validation_tokens: Annotated[int | None, COUNT] = None,
    ):
        """
        Args:
            directory: where tokenizer and packed rows lie; made when missing.
            source: the documents.
            tokenizer: trained on the training documents, or brought along.
            packing: how documents fill rows.
            n_shard: shards of the training rows, the units of parallel preparation.
            on_error: whether an unreadable row of the source is an error or counted and left out.
            sequence_len: tokens per row; filled from model.config.sequence_len.
            micro: rows per micro-batch; filled from batch.micro.
            seed: seed of the order; filled from seed.
            validation_tokens: at most so many; filled from validation.tokens.
        """
        corpus = Corpus(directory, source, tokenizer, packing, sequence_len, n_shard, on_error)
        super().__init__(corpus, micro, seed, validation_tokens)

    def setup(self, stage: str) -> None:
        """Opens the rows; too few for one global batch are a `UserError`."""
        super().setup(stage)
        if stage == "fit":
            self.rows = self.corpus.open_rows("train", self.manifest)
            needed = self.micro * self.trainer.world_size * self.trainer.accumulate_grad_batches
            if len(self.rows) < needed:
                raise UserError(
                    f"{self.corpus.directory} holds {len(self.rows)} training rows, fewer than "
                    f"the {needed} of one global batch: give more text or a smaller batch.tokens"
                    + self.corpus.crop_advice(total_counts(self.manifest["shards"]["train"]))
                )

    def sample_rows(self, n_token: int) -> Tensor:
        """About so many tokens of training rows, (N, T+1), int64, from the whole corpus.

        The same whatever the seed, the ranks and the run's length are.
        """
        n_row = min(len(self.rows), -(-n_token // self.rows.row_len))
        spread = np.linspace(0, len(self.rows) - 1, n_row).astype(np.int64)
        return torch.from_numpy(self.rows.read(spread).astype(np.int64))

    def train_dataloader(self) -> TrainingRows:
        """The whole run, as one epoch."""
        trainer = self.trainer
        n_batch = trainer.max_steps * trainer.accumulate_grad_batches
        rank, world = trainer.global_rank, trainer.world_size
        return TrainingRows(self.rows, self.micro, n_batch, self.seed, rank, world)
