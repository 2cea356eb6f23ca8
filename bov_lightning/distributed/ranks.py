"""What processes have to agree on while they work together."""

from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from bov_lightning.errors import (
    EvaluationInterruptedError,
    RankFailedError,
    StorageError,
    UserError,
)

PATIENCE = timedelta(hours=2)
"""One rank may still tokenise or write while the others wait."""


@lru_cache(maxsize=1)
def _patient_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """One for all evaluations of a job; a new job in this process gets its own."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


class Ranks:
    """Some processes that agree with each other; a single one where there is no group.

    Objects and numbers go through a gloo group of CPU processes, so that they wait for no device.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        """``group``: used by one thread at a time; None: there is one process."""
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of_job(cls) -> "Ranks":
        """All processes of torch.distributed, where it is in use, with time to spare.

        Their group outlives the short time-outs of the training's collectives.
        """
        in_use = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls(_patient_group(dist.group.WORLD) if in_use else None)

    @property
    def active(self) -> bool:
        """Whether there is anybody to agree with."""
        return self.group is not None

    def maximum(self, values: list[float]) -> list[float]:
        """Elementwise maximum over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def total(self, values: list[float]) -> list[float]:
        """Elementwise sum over the ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: list[float], how: Any) -> list[float]:
        if self.group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, how, group=self.group)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group_src=0, group=self.group)
        return box[0]

    def together(self, work: Callable[[], Any]) -> Any:
        """This rank's result of ``work``; what fails on one rank raises on all, see `agree`."""
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        self.agree(error)
        return result

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Rank 0's result of ``work``, which the others do not run."""
        return self.broadcast(self.together(work if self.rank == 0 else lambda: None))

    def agree(self, error: Exception | None) -> None:
        """Raises on all ranks if there is an error on any of them.

        Raises:
            UserError: the user's mistake on some rank, and an interruption likewise.
            RankFailedError: anything else, on the other ranks.
        """
        if self.group is None:
            if error is not None:
                raise error
            return
        if self.maximum([float(error is not None)])[0] == 0:
            return
        found = self.gather(None if error is None else (type(error), str(error)))
        if error is not None:
            raise error
        rank, (kind, message) = next((r, m) for r, m in enumerate(found) if m is not None)
        if issubclass(kind, EvaluationInterruptedError):
            raise EvaluationInterruptedError(message)
        if issubclass(kind, UserError):
            kind = StorageError if issubclass(kind, StorageError) else UserError
            raise kind(f"rank {rank}: {message}")
        raise RankFailedError(f"rank {rank}: {kind.__name__}: {message}")

    @property
    def dcp_options(self) -> dict[str, Any]:
        """How torch.distributed.checkpoint is told about the group."""
        return {"process_group": self.group, "no_dist": self.group is None}
