"""Corpora that are tokenized and packed once, and then read memory-mapped in a global order.

directory/
    manifest.json   settings, fingerprints, rows and checksums; written last
    tokenizer/      a transformers tokenizer
    train.bin       rows of sequence_len + 1 token ids, uint16 or uint32
    val.bin
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from bov_lightning.errors import UserError
from bov_lightning.files import write_directory
from data_modules.order import rows_at
from data_modules.packing import PackingCounts, pack_best_fit
from data_modules.sources import TextSource
from data_modules.tokenizer import (
    TokenizerConfig,
    encode_documents,
    read_tokenizer,
    save_tokenizer,
    token_bytes,
    tokenizer_hash,
    train_tokenizer,
)

MANIFEST = "manifest.json"
SPLITS = ("train", "val")


def _rows_as_tokens(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows.astype(np.int64))


class TrainingRows:
    """Micro-batches (micro, T+1), int64, of this rank, from any position of the global order.

    The order is a function of the seed alone. Position counts samples over all ranks, so it means
    the same whatever the number of ranks, the micro-batch and the accumulation are.
    """

    def __init__(
        self, rows: np.ndarray, micro: int, n_batch: int, seed: int, rank: int, world: int
    ):
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
            yield _rows_as_tokens(self.rows[rows_at(samples, len(self.rows), self.seed)])

    def state_dict(self) -> dict[str, int]:
        """The global position."""
        return {"samples": self.position, "seed": self.seed, "rows": len(self.rows)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at a stored position; another seed or corpus is a `UserError`."""
        for name, own in (("seed", self.seed), ("rows", len(self.rows))):
            if state[name] != own:
                raise UserError(
                    f"the checkpoint was trained with {name} {state[name]} of data, now {own}: its "
                    "position means nothing there; use a new run.name or --resume never"
                )
        self.position = state["samples"]


class ValidationRows:
    """Micro-batches (up to micro, T+1), int64, of this rank's part of the first rows."""

    def __init__(self, rows: np.ndarray, micro: int, rank: int, world: int):
        self.rows, self.micro = rows[rank::world], micro

    def __len__(self) -> int:
        return -(-len(self.rows) // self.micro)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.rows), self.micro):
            yield _rows_as_tokens(self.rows[start : start + self.micro])


class PackedDataModule(pl.LightningDataModule):
    """Tokenizes and packs a corpus once, then serves it."""

    def __init__(
        self,
        directory: str,
        source: TextSource,
        tokenizer: TokenizerConfig = TokenizerConfig(),
        packing_buffer: int = 1000,
        sequence_len: int = 2048,
        micro: int = 16,
        seed: int = 0,
        validation_tokens: int | None = None,
    ):
        """
        Args:
            directory: where tokenizer and packed rows lie; made when missing.
            source: the documents.
            tokenizer: trained on the training documents, or brought along.
            packing_buffer: documents that best-fit packing chooses from.
            sequence_len: tokens per row; filled from model.config.sequence_len.
            micro: rows per micro-batch; filled from batch.micro.
            seed: seed of the order; filled from seed.
            validation_tokens: at most so many; filled from validation.tokens.
        """
        super().__init__()
        self.directory, self.source, self.tokenizer_config = Path(directory), source, tokenizer
        self.packing_buffer, self.sequence_len = packing_buffer, sequence_len
        self.micro, self.seed, self.validation_tokens = micro, seed, validation_tokens
        self.manifest: dict[str, Any] = {}

    @property
    def tokenizer_directory(self) -> Path:
        """The tokenizer, as ``transformers`` reads it."""
        return self.directory / "tokenizer"

    def settings(self) -> dict[str, Any]:
        """Everything that decides what the rows are."""
        own = self.tokenizer_config
        return {
            "source": type(self.source).__name__,
            "fingerprint": self.source.fingerprint(),
            "tokenizer": (
                {"hash": tokenizer_hash(own.path)} if own.path else
                {"vocab_size": own.vocab_size, "max_chars": own.max_chars,
                 "max_chars_per_document": own.max_chars_per_document}
            ),
            "packing": {"kind": "best_fit", "buffer": self.packing_buffer},
            "sequence_len": self.sequence_len,
        }  # fmt: skip

    def prepare_data(self) -> None:
        """Tokenizes and packs, unless the directory holds just that already."""
        settings = self.settings()
        if (self.directory / MANIFEST).is_file():
            found = self._read_manifest()["settings"]
            for name, value in settings.items():
                if found.get(name) != value:
                    raise UserError(
                        f"{self.directory} was prepared with {name} {found.get(name)}, not "
                        f"{value}: choose another data.init_args.directory or delete it"
                    )
            return
        if self.directory.exists() and any(self.directory.iterdir()):
            raise UserError(
                f"{self.directory} exists and holds no {MANIFEST}: choose another folder"
            )
        console = Console(stderr=True)
        with console.status("preparing data") as status:
            write_directory(self.directory, lambda aside: self._prepare(aside, settings, status))
        for split, counts in self._read_manifest()["splits"].items():
            cropped = counts["cropped"] / counts["tokens"]
            console.print(
                f"prepared {counts['rows']:,} {split} rows of {self.sequence_len} tokens "
                f"({cropped:.1%} of the tokens cropped) in {self.directory}",
                highlight=False,
            )

    def _prepare(self, aside: Path, settings: dict, status) -> None:
        if next(self.source.documents("train"), None) is None:
            raise UserError("data: the corpus is empty: no training document holds any text")
        if self.tokenizer_config.path:
            tokenizer = read_tokenizer(self.tokenizer_config.path)
        else:
            status.update("training the tokenizer")
            tokenizer = train_tokenizer(self.source.documents("train"), self.tokenizer_config)
        save_tokenizer(tokenizer, aside / "tokenizer")
        splits = {}
        for split in SPLITS:
            counts, digest = PackingCounts(), hashlib.sha256()
            documents = encode_documents(tokenizer, self.source.documents(split))
            rows = pack_best_fit(documents, self.sequence_len + 1, self.packing_buffer, counts)
            with open(aside / f"{split}.bin", "wb") as file:
                for row in rows:
                    digest.update(row.tobytes())
                    file.write(row.tobytes())
                    if counts.rows % 1000 == 0:
                        status.update(f"packing {split}: {counts.rows:,} rows")
            if not counts.rows:
                raise UserError(
                    f"data: the {split} documents do not fill one row of {self.sequence_len} tokens"
                )
            splits[split] = {**vars(counts), "sha256": digest.hexdigest()}
        manifest = {
            "settings": settings,
            "dtype": "uint16" if tokenizer.get_vocab_size() <= 2**16 else "uint32",
            "vocab_size": tokenizer.get_vocab_size(),
            "tokenizer_hash": tokenizer_hash(aside / "tokenizer"),
            "splits": splits,
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def _read_manifest(self) -> dict[str, Any]:
        path = self.directory / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if not {"settings", "dtype", "vocab_size", "splits"} <= set(manifest):
                raise ValueError("keys are missing")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        return manifest

    def setup(self, stage: str) -> None:
        """Opens the rows."""
        self.manifest = self._read_manifest()
        self.rows = {split: self._open(split) for split in SPLITS}
        self.token_bytes = torch.from_numpy(token_bytes(read_tokenizer(self.tokenizer_directory)))
        if stage == "fit":
            needed = self.micro * self.trainer.world_size * self.trainer.accumulate_grad_batches
            if len(self.rows["train"]) < needed:
                raise UserError(
                    f"{self.directory} holds {len(self.rows['train'])} training rows, fewer than "
                    f"the {needed} of one global batch: give more text or a smaller batch.tokens"
                )

    def _open(self, split: str) -> np.ndarray:
        path, n_row = self.directory / f"{split}.bin", self.manifest["splits"][split]["rows"]
        dtype, shape = np.dtype(self.manifest["dtype"]), (n_row, self.sequence_len + 1)
        if not path.is_file() or path.stat().st_size != n_row * shape[1] * dtype.itemsize:
            raise UserError(
                f"{path} is missing or truncated: delete {self.directory} to prepare it anew"
            )
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)

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
            "val_rows": self.manifest["splits"]["val"]["sha256"][:16],
        }

    def train_dataloader(self) -> TrainingRows:
        """The whole run, as one epoch."""
        trainer = self.trainer
        n_batch = trainer.max_steps * trainer.accumulate_grad_batches
        rank, world = trainer.global_rank, trainer.world_size
        return TrainingRows(self.rows["train"], self.micro, n_batch, self.seed, rank, world)

    def val_dataloader(self) -> ValidationRows:
        """The held-out rows, or the first of them that hold validation_tokens."""
        rows = self.rows["val"]
        if self.validation_tokens is not None:
            rows = rows[: -(-self.validation_tokens // self.sequence_len)]
        return ValidationRows(rows, self.micro, self.trainer.global_rank, self.trainer.world_size)
