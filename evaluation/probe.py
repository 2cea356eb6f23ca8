"""A few tokens that tell, before anything is scored, whether a model can be scored at all.

A score is right only if the logits of a text are those of that text alone, whatever lies beside it
in a batch and whatever prefix was computed before. Nobody's configuration says so: a model may take
positions or windows from the slots of its cache, look ahead, or hold weights that are not finite.
So a ragged pair of texts is computed in every way that scoring and generating use, and compared
with the model's plain call on one text.

The texts come from a random stream of their own. Every rank makes the same calls.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bov_lightning.checkpoint.reading import not_finite
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.distributed.sharding import local_part
from bov_lightning.errors import UserError
from evaluation.backends import Backend

N_TOKEN = 24
"""Tokens of the longer text, unless a window asks for more or the context for fewer."""
MAX_N_TOKEN = 300
"""Windows that need more are not crossed; prefixes of one length are used beside any window."""
SHORT = 2
"""Tokens of the shorter prefix."""
CHOICES = (1, 3)
"""Tokens that continue the longer and the shorter prefix: the other way round, so that each is
padded once."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.15}
"""How far logits may be apart, relative to their own spread at a position, by dtype."""
COARSE = 0.5
"""The same for numbers of 8 bits, whose scales depend on the batch."""


class _FailedError(Exception):
    """A call of the model that raised, on this rank or another."""


class Probe:
    """The comparisons of one model.

    Args:
        backend: the model; what turns out to be wrong is switched off in it.
        tokenizer: a ``transformers`` tokenizer.
        start: the token that every text starts with.
        ranks: the processes that make the same calls.
    """

    def __init__(self, backend: Backend, tokenizer: Any, start: int, ranks: Ranks):
        self.backend, self.ranks = backend, ranks
        if start >= backend.vocab_size:
            raise UserError(
                f"the tokenizer starts texts with token {start}, but the model's vocabulary has "
                f"{backend.vocab_size} tokens: they do not belong together"
            )
        wanted = max(N_TOKEN, (backend.smallest_window or 0) + 8)
        self.n_token = min(wanted, MAX_N_TOKEN, backend.max_length)
        self.ids = _texts(backend.vocab_size, tokenizer, start, self.n_token)
        self.lengths = (self.n_token, min(SHORT + CHOICES[1], self.n_token))
        self.tolerance = _tolerance(backend)
        self._alone: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def __call__(self) -> list[str]:
        """What was switched off, in sentences for the report.

        Raises:
            UserError: logits that are not finite, or that depend on the other texts of a batch.
        """
        self._check_finite()
        notes = []
        if not self._agrees(self._padded):
            if not self.backend.computes_all_logits():
                raise self._inexact()
            if not self._agrees(self._padded):
                raise self._inexact()
        if self.backend.shares_prefix and not self._shares():
            self.backend.shares_prefix = False
            notes.append(
                f"{self.backend.name} computes other logits after a prefix that is shared or kept: "
                "every row was computed whole, which is exact and takes longer"
            )
        return notes

    def _shares(self) -> bool:
        """Whether prefixes can be continued; of one length only, where others come out wrong."""
        if self.n_token < SHORT + 2 * CHOICES[1]:
            return False
        if not self.backend.equal_prefixes:
            if self._agrees(lambda: self._continued(equal=False)):
                return True
            self.backend.equal_prefixes = True
        return self._agrees(lambda: self._continued(equal=True))

    # Calls of the model, in step with every other rank.

    def _call(self, ids: list[np.ndarray], cache: Any = None) -> list[Tensor]:
        """Logits (T - T // 2, V) of the second half of the new tokens, of every row."""
        lengths = [len(row) for row in ids]
        padded = np.zeros((len(ids), max(lengths)), dtype=np.int64)
        positions = np.zeros((len(ids), max(n - n // 2 for n in lengths)), dtype=np.int64)
        for i, (row, n) in enumerate(zip(ids, lengths, strict=True)):
            padded[i, :n] = row
            positions[i, : n - n // 2] = np.arange(n // 2, n)
        device = self.backend.device
        tensors = (torch.from_numpy(padded).to(device), torch.from_numpy(positions).to(device))
        logits = self._together(
            lambda: self.backend.compute(tensors[0], lengths, tensors[1], cache)
        )
        return [row[: n - n // 2] for row, n in zip(logits, lengths, strict=True)]

    def _together(self, call) -> Any:
        try:
            return self.ranks.together(call)
        except UserError:
            raise
        except Exception as error:
            detail = " ".join(str(error).split())[:200]
            raise _FailedError(f"{type(error).__name__}: {detail}") from error

    def _reference(self, row: int, n: int) -> Tensor:
        """Logits (at least n, V) of the first tokens of a text, by the model's plain call.

        What follows in the same text changes nothing, or the model is not causal, which the padded
        pair tells.
        """
        known = next((m for r, m in self._alone if r == row and m >= n), None)
        if known is None:
            ids = torch.from_numpy(self.ids[row][None, :n]).to(self.backend.device)
            self._alone[row, n] = self._together(lambda: self.backend.whole(ids))[0]
            known = n
        return self._alone[row, known]

    # The ways of computing.

    def _padded(self) -> Iterable[tuple[Tensor, Tensor]]:
        found = self._call([self.ids[i][:n] for i, n in enumerate(self.lengths)])
        yield from self._compared(found, (0, 0), self.lengths)

    def _continued(self, equal: bool) -> Iterable[tuple[Tensor, Tensor]]:
        """A kept prefix, continued by texts of two lengths in a branch, then token by token.

        The first is how choices are scored, the second how texts are generated. Slots of padding
        count too: none beyond the context is used.
        """
        first = self.n_token - CHOICES[1]
        prefixes = (first, first if equal else SHORT)
        cache = self._together(lambda: self.backend.new_cache(2, self.n_token))
        found = self._call([self.ids[i][:n] for i, n in enumerate(prefixes)], cache)
        yield from self._compared(found, (0, 0), prefixes)
        branch = self._together(lambda: self.backend.branch(cache, [1, 0]))
        ends = tuple(n + more for n, more in zip(prefixes, CHOICES, strict=True))
        # In another order than the prefixes have.
        found = self._call([self.ids[i][prefixes[i] : ends[i]] for i in (1, 0)], branch)
        yield from self._compared(found[::-1], prefixes, ends)
        for step in range(2):  # which a branch must have left as it was
            starts = tuple(n + step for n in prefixes)
            ends = tuple(n + 1 for n in starts)
            found = self._call([self.ids[i][n : n + 1] for i, n in enumerate(starts)], cache)
            yield from self._compared(found, starts, ends)

    def _compared(self, found: list[Tensor], starts: tuple, ends: tuple) -> Iterable[tuple]:
        for i, (logits, start, end) in enumerate(zip(found, starts, ends, strict=True)):
            yield logits, self._reference(i, end)[start:end][-len(logits) :]

    def _agrees(self, compute) -> bool:
        """Whether some way of computing gives the logits of the plain call, on every rank."""
        try:
            # To the end: every rank makes the same calls, whatever it finds.
            differ = [self._differ(found, alone) for found, alone in compute()]
        except _FailedError:
            return False
        return not any(self.ranks.maximum([float(far) for far in differ]))

    def _differ(self, found_TV: Tensor, alone_TV: Tensor) -> bool:
        spread = (alone_TV - alone_TV.mean(-1, keepdim=True)).norm(dim=-1)
        rounding = 10 * torch.finfo(torch.float32).eps * alone_TV.norm(dim=-1)
        # A NaN is no agreement.
        near = (found_TV - alone_TV).norm(dim=-1) <= self.tolerance * spread + rounding
        return not bool(near.all())

    # What cannot be scored.

    def _check_finite(self) -> None:
        try:
            logits = [self._reference(i, n) for i, n in enumerate(self.lengths)]
        except _FailedError as error:
            raise UserError(f"{self.backend.name} cannot be computed: {error}") from error
        bad = any(not bool(part.logsumexp(-1).isfinite().all()) for part in logits)
        if not self.ranks.maximum([float(bad)])[0]:
            return
        named = ((name, local_part(p)) for name, p in self.backend.model.named_parameters())
        found = next(filter(None, self.ranks.gather(not_finite(named))), None)
        dtype = str(_dtype(self.backend)).removeprefix("torch.")
        advice = (
            f"the weights are, so that {dtype} overflows: evaluate in float32"
            if found is None
            else f"{found}, so that no score means anything: use another checkpoint"
        )
        raise UserError(f"the logits of {self.backend.name} are not finite: {advice}")

    def _inexact(self) -> UserError:
        return UserError(
            f"{self.backend.name} cannot be scored: its logits for a text change with what else is "
            "in the batch, so it is no causal language model, or not in the way that it is loaded"
        )


def _texts(n_vocab: int, tokenizer: Any, start: int, n_token: int) -> list[np.ndarray]:
    """Two texts of tokens that the tokenizer uses for text; int64."""
    special = [*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})]
    usable = np.setdiff1d(np.arange(min(n_vocab, len(tokenizer))), special)
    if not len(usable):
        usable = np.arange(n_vocab)
    texts = np.random.default_rng(0).choice(usable, size=(2, n_token)).astype(np.int64)
    texts[:, 0] = start
    return list(texts)


def _dtype(backend: Backend) -> torch.dtype:
    """What the model computes in: that of its weights, or of the autocast that it runs under."""
    if torch.is_autocast_enabled(backend.device.type):
        return torch.get_autocast_dtype(backend.device.type)
    return next(p.dtype for p in backend.model.parameters() if p.is_floating_point())


def _tolerance(backend: Backend) -> float:
    modules = {type(module).__name__ for module in backend.model.modules()}
    if any("Float8" in name or "8bit" in name or "4bit" in name for name in modules):
        return COARSE
    dtype = _dtype(backend)
    if any(local_part(p) is not p for p in backend.model.parameters()):
        # FSDP2 may compute in bf16 what it keeps in fp32.
        dtype = torch.bfloat16
    elif dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        dtype = torch.float16
    return TOLERANCE.get(dtype, COARSE)
