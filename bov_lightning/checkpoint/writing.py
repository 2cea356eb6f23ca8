"""Writes and reads the tensors of a checkpoint, each rank its part, while training goes on.

A save has two halves. The first copies this rank's part into CPU memory, which is all that training
waits for. The second runs in a thread: torch.distributed.checkpoint spreads the tensors over the
ranks and writes safetensors, whose headers say which part of a tensor they hold, so that any number
of ranks can read them, and reading runs no code. Rank 0 then lists all files with their sizes and
checksums in the marker and renames the directory into place.
"""

import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from bov_lightning.checkpoint import directory as checkpoints
from bov_lightning.errors import UserError
from bov_lightning.files import aside_of, file_error, put_in_place, remove

State = dict[str, Tensor]


def weights_of(model: nn.Module) -> State:
    """The parameters by their name in `Transformer`; DTensors where they are sharded."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """The optimizer's state by parameter name and kind: ``blocks.0.mlp.input.weight.momentum``."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{kind}": value
        for parameter, values in optimizer.state.items()
        for kind, value in values.items()
    }


def random_state(rank: int, device: torch.device) -> State:
    """The states of this process's random generators."""
    _, words, _ = random.getstate()
    _, keys, position, *_ = np.random.get_state()
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position], dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return {f"random.{rank}.{kind}": value for kind, value in state.items()}


def set_random_state(state: State, rank: int, device: torch.device) -> None:
    """Continues where `random_state` was taken."""
    own = {kind: state[f"random.{rank}.{kind}"] for kind in ("python", "numpy", "torch")}
    random.setstate((3, tuple(own["python"].tolist()), None))
    keys, position = own["numpy"][:-1].tolist(), int(own["numpy"][-1])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position))
    torch.set_rng_state(own["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[f"random.{rank}.cuda"], device)


class Ranks:
    """The processes that write or read a checkpoint together."""

    def __init__(self, group: dist.ProcessGroup | None):
        """``group``: of CPU processes; None: there is one."""
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """The results of all ranks; what one of them cannot do is a `UserError` on all."""
        result, message = None, ""
        try:
            result = work()
        except UserError as error:
            message = str(error)
        outcomes = [(result, message)]
        if self.group is not None:
            outcomes = [None] * self.world
            dist.all_gather_object(outcomes, (result, message), group=self.group)
        for rank, (_, failed) in enumerate(outcomes):
            if failed:
                raise UserError(failed if self.world == 1 else f"rank {rank}: {failed}")
        return [result for result, _ in outcomes]

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Rank 0's result."""
        return self.together(work if self.rank == 0 else lambda: None)[0]

    @property
    def dcp_options(self) -> dict[str, Any]:
        """How torch.distributed.checkpoint is told about the group."""
        return {"process_group": self.group, "no_dist": self.group is None}


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time."""

    def __init__(self, run: Path, config_yaml: str, ranks: Ranks):
        """
        Args:
            run: the run directory.
            config_yaml: the resolved recipe.
            ranks: their group is used by the writing thread alone.
        """
        self.run, self.config_yaml, self.ranks = run, config_yaml, ranks
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
        staged = self._stager.stage({"weights": weights, "optimizer": optimizer})
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        target = self.run / "checkpoints" / checkpoints.step_name(step)
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
        ranks, parts = self.ranks, {checkpoints.WEIGHTS: weights, checkpoints.OPTIMIZER: optimizer}
        try:
            ranks.on_first(lambda: _reported(target, lambda: self._begin(target, parts, rest)))
            facts = ranks.together(lambda: _reported(target, lambda: self._save(target, parts)))
            ranks.on_first(lambda: _reported(target, lambda: _finish(target, step, facts)))
        except BaseException:
            if ranks.rank == 0:
                remove(aside_of(target))
            raise
        if ranks.rank == 0:
            then()

    def _begin(self, target: Path, parts: dict[str, State], rest: dict) -> None:
        aside = aside_of(target)
        remove(aside)
        aside.mkdir(parents=True)
        tensors = [tensor for part in parts.values() for tensor in part.values()]
        n_byte = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        free = shutil.disk_usage(aside).free
        if free < n_byte:
            raise UserError(
                f"{target} cannot be written: it needs {n_byte / 1e6:,.1f} MB, and "
                f"{free / 1e6:,.1f} MB are free"
            )
        (aside / checkpoints.CONFIG).write_text(self.config_yaml, encoding="utf-8")
        tokenizer = self.run / checkpoints.TOKENIZER
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, aside / checkpoints.TOKENIZER)
        torch.save(rest, aside / checkpoints.TRAINING)

    def _save(self, target: Path, parts: dict[str, State]) -> dict[str, dict[str, int]]:
        """Writes this rank's part; returns size and checksum of its files."""
        aside = aside_of(target)
        for name, tensors in parts.items():
            writer = HuggingFaceStorageWriter(str(aside / name), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, **self.ranks.dcp_options)
        own = f"shard-{self.ranks.rank + 1:05d}-"
        names = [n for n in checkpoints.list_files(aside) if Path(n).name.startswith(own)]
        return checkpoints.file_facts(aside, names)


def _reported(target: Path, work: Callable[[], Any]) -> Any:
    """The result of ``work``; what the file system refuses is a `UserError`."""
    try:
        return work()
    except (Exception, dcp.CheckpointException) as error:
        failures = getattr(error, "failures", None) or {0: (error, None)}
        cause = next(iter(failures.values()))[0]
        raise file_error(cause, target) or UserError(
            f"{target} cannot be written: {cause!r}"
        ) from error


def _finish(target: Path, step: int, facts: list[dict[str, dict[str, int]]]) -> None:
    """Declares the checkpoint complete and puts it in place."""
    aside = aside_of(target)
    files = {name: found for part in facts for name, found in part.items()}
    common = [name for name in checkpoints.list_files(aside) if name not in files]
    checkpoints.write_marker(aside, step, files | checkpoints.file_facts(aside, common))
    put_in_place(target)


def restore(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks,
    device: torch.device,
) -> tuple[Path | None, dict[str, Any], list[str]]:  # fmt: skip
    """Fills model and optimizer from the newest checkpoint that is complete and readable.

    All ranks call this together. Rank 0 says which checkpoints there are, since file systems of
    clusters do not show all ranks the same at once.

    Returns:
        The checkpoint (None: there is none, and nothing was changed), what else was stored in it,
        and messages about what was taken and what was not.

    Raises:
        UserError: there were complete checkpoints, but none can be used any more.
    """
    found = ranks.on_first(
        lambda: [(path, checkpoints.problem(path)) for path in checkpoints.step_directories(run)]
    )
    messages, was_complete = [], False
    for path, reason in reversed(found):
        was_complete = was_complete or (path / checkpoints.MARKER).exists()
        if reason is None:
            try:
                rest = _restore_from(path, model, optimizer, ranks, device)
            except UserError as error:
                reason = str(error)
            else:
                messages.append(f"resuming {run} from step {rest['global_step']} ({path})")
                return path, rest, messages
        messages.append(f"skipped {path}: {reason}")
    if was_complete:
        raise UserError(
            f"no checkpoint of {run} can be used ({'; '.join(messages)}): put one back, or start "
            "afresh with --resume never"
        )
    return None, {}, messages


def _restore_from(
    checkpoint: Path, model: nn.Module, optimizer: Any, ranks: Ranks, device: torch.device
) -> dict[str, Any]:
    """Every rank checks and reads its part; what one of them cannot read is an error on all."""

    def check() -> None:
        if damage := checkpoints.damaged_file(checkpoint, ranks.rank, ranks.world):
            raise UserError(damage)

    def read() -> dict[str, Any]:
        options, folder = ranks.dcp_options, checkpoint / checkpoints.OPTIMIZER
        checkpoints.read_tensors(checkpoint / checkpoints.WEIGHTS, weights_of(model), **options)
        optimizer.create_state()
        state = optimizer_state_of(model, optimizer)
        random = random_state(ranks.rank, device)
        # Another number of ranks, or another device, has no use for the stored states.
        stored = set(checkpoints.stored_tensors(folder))
        same_ranks = set(random) <= stored and f"random.{ranks.world}.torch" not in stored
        checkpoints.read_tensors(folder, state | random if same_ranks else state, **options)
        if same_ranks:
            set_random_state(random, ranks.rank, device)
        return checkpoints.read_training_state(checkpoint)

    ranks.together(check)
    return ranks.together(read)[ranks.rank]
