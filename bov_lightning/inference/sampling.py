"""How the next token is chosen."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from bov_lightning.errors import UserError
from bov_lightning.kinds import COUNT, SEED, Range

if TYPE_CHECKING:
    import torch
    from torch import Tensor


COLD = 1e-30
"""A temperature below it would divide logits beyond what fp32 can hold."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a text ends."""

    max_new_tokens: Annotated[int, COUNT] = 100
    """Tokens to add at most."""
    temperature: Annotated[float, Range(0, 10**6)] = 0.8
    """Divides the logits; 0: always the likeliest token."""
    top_k: Annotated[int | None, COUNT] = None
    """Choose among the k likeliest only; None: all."""
    top_p: Annotated[float | None, Range(above=0, most=1)] = None
    """Choose among the likeliest that together have this probability; None: all."""
    seed: Annotated[int, SEED] = 0
    """Seed of the first text; the next one's is one more."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these."""

    def __post_init__(self):
        no_choice = self.top_k is not None and self.top_k < 1
        if self.max_new_tokens < 1 or not 0 <= self.temperature < math.inf or no_choice:
            raise UserError("--max-new-tokens and --top-k are at least 1, --temperature at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}: above 0, at most 1")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}: an integer of 64 bits is needed")
        if "" in self.stop:
            raise UserError("--stop is empty: give the text to stop at")


def has_choice(logits_BV: "Tensor") -> list[bool]:
    """Whether each row of logits has a likeliest token: no NaN, nothing infinite above the rest."""
    return logits_BV.amax(-1).isfinite().tolist()


def likeliest(logits_BV: "Tensor") -> "Tensor":
    """(2, B) int64 where the logits are: whether each row `has_choice`, and its likeliest token."""
    import torch

    return torch.stack((logits_BV.amax(-1).isfinite().long(), logits_BV.argmax(-1)))


def choose(logits_V: "Tensor", sampling: Sampling, generator: "torch.Generator") -> int:
    """The next token of one row, from its fp32 logits on the CPU."""
    import torch

    if sampling.temperature < COLD:
        return int(logits_V.argmax())
    if sampling.top_k is not None:
        kept = logits_V.topk(min(sampling.top_k, len(logits_V)))
        logits_V = torch.full_like(logits_V, -torch.inf).scatter(0, kept.indices, kept.values)
    probability = torch.softmax(logits_V / sampling.temperature, dim=-1)
    if sampling.top_p is not None:
        ordered, index = probability.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered >= sampling.top_p
        probability = torch.zeros_like(probability).scatter(
            0, index, ordered.masked_fill(beyond, 0)
        )
    return int(torch.multinomial(probability, 1, generator=generator))
