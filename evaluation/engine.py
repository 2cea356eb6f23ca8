"""A model, its tokenizer and the ranks that share the rows of an evaluation, call by call."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from bov_lightning.distributed.ranks import Ranks
from bov_lightning.errors import EvaluationInterruptedError, UserError
from evaluation.backends import Backend
from evaluation.encoding import Counts, Encoder
from evaluation.probe import Probe

DEFAULT_BUDGETS = {"cpu": 2048, "cuda": 8192}
"""Tokens per forward pass: what stays in a CPU's cache, what keeps a GPU busy."""


class Engine:
    """What scoring and generating have in common.

    Args:
        backend: the model.
        tokenizer: a ``transformers`` tokenizer.
        budget: tokens per forward pass; None: what suits the device.
        should_stop: asked on every rank after every call of the model; True on one stops all.
        progress: takes finished and total requests of this rank.
        ranks: the processes that share the rows; None: all of this job.
    """

    def __init__(
        self, backend: Backend, tokenizer: Any, budget: int | None,
        should_stop: Callable[[], bool], progress: Callable[[int, int], None],
        ranks: Ranks | None,
    ):  # fmt: skip
        self.backend, self.tokenizer = backend, tokenizer
        self.budget = budget or DEFAULT_BUDGETS["cpu" if backend.device.type == "cpu" else "cuda"]
        self.should_stop, self.progress = should_stop, progress
        self.ranks = ranks or Ranks.of_job()
        self.encoder, self.counts = Encoder(tokenizer), Counts()
        self._probed = False
        self.notes: list[str] = []
        """What the report says about how the model had to be computed."""

    def prepare(self) -> None:
        """Finds out once, before anything is scored, whether and how the model can be.

        Every rank must call it, at the same point.

        Raises:
            UserError: the model cannot be scored.
        """
        if not self._probed:
            start = int(self.encoder.bos[0])
            self.notes += Probe(self.backend, self.tokenizer, start, self.ranks)()
            self._probed = True

    def check_vocabulary(self, ids: np.ndarray, where: str) -> None:
        """Token ids that the model has no row for are a `UserError`."""
        if (largest := int(ids.max())) >= self.backend.vocab_size:
            raise UserError(
                f"{where}: token id {largest} is outside of the vocabulary of "
                f"{self.backend.vocab_size}: the tokenizer is not this model's"
            )

    def tensor(self, array: np.ndarray) -> Tensor:
        """The array on the model's device."""
        return torch.from_numpy(array).to(self.backend.device)

    def idle(self) -> None:
        """The smallest call of the model, while other ranks still have rows."""
        bos = self.tensor(self.encoder.bos.astype(np.int64)[None])
        self.backend(bos, [1], torch.zeros_like(bos))

    def in_lockstep(
        self, call: Callable[[], Any], where: Callable[[], str],
        goes_on: Callable[[], bool] = lambda: False,
    ) -> bool:  # fmt: skip
        """One call of the model, together with every other rank.

        Args:
            call: makes it.
            where: says what is left when it is stopped.
            goes_on: asked after it.

        Returns:
            Whether any rank goes on.

        Raises:
            EvaluationInterruptedError: `should_stop` said so on some rank.
            RankFailedError: another rank failed.
        """
        error = None
        try:
            call()
        except Exception as caught:
            error = caught
        stop = error is None and self.should_stop()
        flags = [float(error is not None), float(stop), float(goes_on())]
        failed, stopped, going = self.ranks.maximum(flags)
        if failed:
            self.ranks.agree(error)
        if stopped:
            raise EvaluationInterruptedError(where())
        return bool(going)


def origin(request: Instance) -> str:
    """Where a request comes from, for messages."""
    number = "" if request.doc_id is None else f", row {request.doc_id}"
    return f"task {request.task_name}{number}"
