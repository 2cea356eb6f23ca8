"""Writes checkpoints: a run's, each rank its part, while training goes on; and whole ones.

A save has two halves. The first copies this rank's part into CPU memory, which is all that training
waits for. The second runs in a thread: torch.distributed.checkpoint spreads the tensors over the
ranks and writes safetensors, whose headers say which part of a tensor they hold, so that any number
of ranks can read them, and reading runs no code. Rank 0 then lists all files with their sizes and
checksums in the marker and renames the directory into place.
"""

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from bov_lightning.checkpoint.directory import (
    CODE,
    CONFIG,
    OPTIMIZER,
    TOKENIZER,
    TRAINING,
    WEIGHTS,
    file_facts,
    list_files,
    step_name,
    trust,
    write_marker,
)
from bov_lightning.checkpoint.resuming import State
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.errors import StorageError, UserError
from bov_lightning.files import aside_of, file_error, put_in_place, remove, write_directory
from bov_lightning.model.config import TransformerConfig


def write_checkpoint(
    target: Path,
    step: int,
    weights: dict[str, Tensor],
    config_yaml: str,
    tokenizer: Path | None = None,
) -> None:
    """Writes a checkpoint directory of whole weights alone, complete or absent.

    Args:
        target: the directory.
        step: optimizer steps behind it.
        weights: by their name in `Transformer`.
        config_yaml: the resolved recipe.
        tokenizer: a directory to copy.
    """

    def write(aside: Path) -> None:
        (aside / CONFIG).write_text(config_yaml, encoding="utf-8")
        if tokenizer is not None:
            shutil.copytree(tokenizer, aside / TOKENIZER)
        (aside / WEIGHTS).mkdir()
        whole = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
        save_file(whole, aside / WEIGHTS / "model.safetensors")
        write_marker(aside, step, file_facts(aside, list_files(aside)))

    write_directory(target, write)


class _InThisRun(FileSystem):
    """Makes a folder, but not those above it: a run that has been moved away stays away."""

    def mkdir(self, path: str | os.PathLike) -> None:
        Path(path).mkdir(exist_ok=True)


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time."""

    def __init__(
        self, run: Path, config_yaml: str, ranks: Ranks, check: Callable[[], None] = lambda: None
    ):
        """
        Args:
            run: the run directory; it is there, and where it is not any more nothing is written.
            config_yaml: the resolved recipe.
            ranks: their group is used by the writing thread alone.
            check: called on rank 0 before anything is written, and when that failed; raises a
                `UserError` where nothing must be written.
        """
        self.run, self.config_yaml, self.ranks, self.check = run, config_yaml, ranks, check
        # Kept buffers in pinned memory make copies from a GPU fast.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())
        self.complete: int | None = None
        """Step of the newest checkpoint that is known to be complete."""
        self.writing: int | None = None
        """Step of the one that is being written."""
        self.failure = ""
        """Why the last one could not be written."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._preparing: threading.Thread | None = None

    def prepare(self, device: torch.device, weights: State, optimizer: State) -> None:
        """Makes the buffers of saves from a GPU in a thread, once: pinning memory takes seconds.

        ``device`` is where the tensors lie; they are those of `start`. What is copied meanwhile is
        dropped.
        """

        def stage() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # Without buffers the first save makes them, and says what is wrong.
            with suppress(RuntimeError):
                self._stager.stage({"weights": weights, "optimizer": optimizer})

        if self._preparing is None:
            self._preparing = threading.Thread(target=stage, name="buffers", daemon=True)
            self._preparing.start()

    def start(
        self, step: int, weights: State, optimizer: State, rest: dict[str, Any],
        then: Callable[[], None],
    ) -> None:  # fmt: skip
        """Copies the tensors and starts to write; all ranks call it at the same step, after `wait`.

        Args:
            step: optimizer steps taken.
            weights: `weights_of` the model.
            optimizer: `optimizer_state_of` it, and `random_state`.
            rest: everything else that resuming needs; rank 0's is written.
            then: called on rank 0 when the checkpoint is complete.
        """
        if self._preparing is not None:
            self._preparing.join()
        staged = self._stager.stage({"weights": weights, "optimizer": optimizer})
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        target = self.run / "checkpoints" / step_name(step)
        arguments = (target, step, staged["weights"], staged["optimizer"], rest, then)
        # Not a daemon: a process that ends by itself finishes its checkpoint.
        self.writing = step
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self, quietly: bool = False) -> bool:
        """Waits until nothing is being written; returns whether something was.

        A write that failed raises its `UserError` here, unless ``quietly``.
        """
        if self._thread is None:
            return False
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None and not quietly:
            raise error
        return True

    def _run(self, target: Path, step: int, *arguments) -> None:
        try:
            self._write(target, step, *arguments)
            self.complete, self.failure = step, ""
        except BaseException as error:
            self._error, self.failure = error, str(error)
        self.writing = None

    def _write(
        self, target: Path, step: int, weights: State, optimizer: State, rest: dict, then: Callable
    ) -> None:
        ranks, parts = self.ranks, {WEIGHTS: weights, OPTIMIZER: optimizer}
        try:
            ranks.on_first(lambda: self._report(target, lambda: self._begin(target, parts, rest)))
            saved = ranks.together(lambda: self._report(target, lambda: self._save(target, parts)))
            facts = ranks.gather(saved)
            ranks.on_first(lambda: self._report(target, lambda: _finish(target, step, facts)))
        except BaseException:
            if ranks.rank == 0:
                remove(aside_of(target))
            raise
        if ranks.rank == 0:
            then()

    def _begin(self, target: Path, parts: dict[str, State], rest: dict) -> None:
        self.check()
        aside = aside_of(target)
        # Not with its parents, see `_InThisRun`.
        aside.parent.mkdir(exist_ok=True)
        # Of a run that was moved while it was written, another step's may be left as well.
        for left in aside.parent.glob(".step-*.partial"):
            remove(left)
        aside.mkdir()
        tensors = [tensor for part in parts.values() for tensor in part.values()]
        n_byte = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        free = shutil.disk_usage(aside).free
        if free < n_byte:
            raise StorageError(
                f"{target} cannot be written: it needs {n_byte / 1e6:,.1f} MB, and "
                f"{free / 1e6:,.1f} MB are free"
            )
        (aside / CONFIG).write_text(self.config_yaml, encoding="utf-8")
        for name in (TOKENIZER, CODE):
            if (self.run / name).is_dir():
                shutil.copytree(self.run / name, aside / name)
        torch.save(rest, aside / TRAINING)

    def _save(self, target: Path, parts: dict[str, State]) -> dict[str, dict[str, int]]:
        """Writes this rank's part; returns size and checksum of its files."""
        aside = aside_of(target)
        for name, tensors in parts.items():
            writer = HuggingFaceStorageWriter(str(aside / name), save_distributed=True)
            writer.fs = _InThisRun()
            dcp.save(tensors, storage_writer=writer, **self.ranks.dcp_options)
        own = f"shard-{self.ranks.rank + 1:05d}-"
        names = [n for n in list_files(aside) if Path(n).name.startswith(own)]
        return file_facts(aside, names)

    def _report(self, target: Path, work: Callable[[], Any]) -> Any:
        """The result of ``work``; what the file system refuses is a `UserError`."""
        try:
            return work()
        except (Exception, dcp.CheckpointException) as error:
            if self.ranks.rank == 0:
                self.check()
            failures = getattr(error, "failures", None) or {0: (error, None)}
            cause = next(iter(failures.values()))[0]
            raise file_error(cause, target) or UserError(
                f"{target} cannot be written: {cause!r}"
            ) from error


def _finish(target: Path, step: int, facts: list[dict[str, dict[str, int]]]) -> None:
    """Declares the checkpoint complete and puts it in place."""
    aside = aside_of(target)
    files = {name: found for part in facts for name, found in part.items()}
    common = [name for name in list_files(aside) if name not in files]
    write_marker(aside, step, files | file_facts(aside, common))
    put_in_place(aside, target)
    trust(target)


def config_yaml(config: TransformerConfig) -> str:
    """The recipe of a checkpoint of which only the network's shape is known."""
    from dataclasses import asdict

    return yaml.safe_dump({"model": {"config": asdict(config)}}, sort_keys=False)
