"""What a probe finds, as dataclasses."""

import math
from dataclasses import asdict, dataclass
from typing import Any

ELEMENT_BYTES = 2
"""Tables and caches are counted in bf16."""


@dataclass(frozen=True)
class Cost:
    """What a model loses, per target token of held-out text.

    That of a set may be the cost of a similar one, which more text was taken for, and the
    difference between the two.
    """

    nats: float
    """Loss less that of the unchanged model."""
    standard_error: float
    """Of ``nats``, over rows; NaN from a single row."""
    kl: float
    """KL divergence from the unchanged model's distribution, in nats."""
    agreement: float
    """Share of positions at which the likeliest token is the same."""
    n_token: int
    """Targets that the model was computed on with these tables."""


@dataclass(frozen=True)
class LayerResult:
    """One layer alone."""

    layer: int
    cost: Cost | None
    """With a table in this layer alone; None for layers that may not go."""
    explained: float
    """Share of the variance of held-out values that the table explains."""
    explained_per_head: list[float]
    context_free: bool
    """Whether a token's values are the same wherever it stands."""
    cached: bool
    """Whether decoding keeps the values: a layer with a table of the model's own does not."""
    strength: float
    """Tokens that the regression counts as much as, in the mean of an id."""
    weighted: bool
    """Whether means are weighted by attention."""


@dataclass(frozen=True)
class SetResult:
    """Several layers together."""

    layers: list[int]
    """In the order in which they go."""
    cost: Cost
    own_rows: int | None
    """How many of the most frequent ids have rows of their own; None: all."""
    saved_bytes_per_token: int
    """Of the V cache, in bf16."""
    saved_share: float
    """Of the V cache of all layers."""
    table_bytes: int
    """In bf16."""
    break_even_tokens: int | None
    """Cached tokens, over the whole batch, from which on memory is saved; None: nothing is."""


@dataclass(frozen=True)
class ProbeResult:
    """All of it, for one model."""

    name: str
    make: str
    """The model's class."""
    n_layer: int
    n_head: int
    """Value heads."""
    head_dim: int
    vocab_size: int
    """Rows of the embedding."""
    nats: float
    """Loss of the unchanged model on held-out text, per token."""
    tokens: dict[str, int]
    """How many each part of the text has: calibration, choice, measured."""
    text: str
    """Changes when the text does: costs of two models are of one text where it is the same and
    their tokenizers are."""
    layers: list[LayerResult]
    curve: list[SetResult]
    """The first so many layers of the greedy order, one more each time."""
    last_third: SetResult
    """The paper's choice."""
    small_tables: list[SetResult]
    """Some of the curve's sets with rows for the most frequent ids only."""

    @property
    def order(self) -> list[int]:
        """The layers as they go."""
        return self.curve[-1].layers

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold; None for what is not known."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
