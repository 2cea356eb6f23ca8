"""What ranks have to agree on while they share the rows of an evaluation."""

from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from bov_lightning.errors import UserError

TIMEOUT = timedelta(hours=2)
"""One rank may still tokenise or write while the others wait."""


class EvaluationInterruptedError(Exception):
    """An evaluation was asked to stop; all ranks raise it after the same batch."""


class EvaluationFailedError(RuntimeError):
    """An evaluation failed on some rank; all ranks raise it, with the message of the first."""


@lru_cache(maxsize=1)
def _gloo_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """One group for all evaluations of a job; a new job in this process gets its own."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT)


class Ranks:
    """The processes of this job; alone where torch.distributed is not in use.

    Objects and flags go through a gloo group of their own, so that they need no GPU and outlive the
    short time-outs of the training's collectives.
    """

    def __init__(self):
        self.active = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.active else 0
        self.size = dist.get_world_size() if self.active else 1
        self._group = _gloo_group(dist.group.WORLD) if self.active else None

    def maximum(self, values: list[float]) -> list[float]:
        """Elementwise maximum over the ranks."""
        if not self.active:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if not self.active:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""
        if not self.active:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def together(self, action: Callable[[], Any]) -> Any:
        """Runs something without collectives on every rank; if it fails on one, all raise."""
        result, error = None, None
        try:
            result = action()
        except Exception as caught:
            error = caught
        self.agree(error)
        return result

    def agree(self, error: Exception | None) -> None:
        """Raises on all ranks if there is an error on any of them."""
        if not self.active:
            if error is not None:
                raise error
            return
        if self.maximum([float(error is not None)])[0] == 0:
            return
        messages = self.gather(None if error is None else (type(error), str(error)))
        if error is not None:
            raise error
        rank, (kind, message) = next((r, m) for r, m in enumerate(messages) if m is not None)
        if issubclass(kind, UserError | EvaluationInterruptedError):
            raise kind(message)
        raise EvaluationFailedError(f"rank {rank}: {kind.__name__}: {message}")
