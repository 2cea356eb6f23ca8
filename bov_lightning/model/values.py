"""Value sources: where the value vectors of an attention layer come from.

A source is one class. It owns its parameters, their initialisation and optimizer group, its forward
pass, and says what decoding must keep for it. `LayerValues` combines a source with a coefficient
and with the layer's context value x W_V; the variants of the paper are such combinations.

Shapes: B batch, T time, C = d_model, V = n_kv_head * head_dim.
"""

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bov_lightning.model.decode import attend_bank, attend_values
from bov_lightning.model.layers import Initialiser, Linear, rms_norm
from bov_lightning.model.lookup import register, source_class

if TYPE_CHECKING:
    from bov_lightning.model.attention import Mask
    from bov_lightning.model.cache import LayerCache
    from bov_lightning.model.config import TransformerConfig
    from bov_lightning.model.offload import HostTable

GATE_CHANNELS = 12
"""The gate reads the first channels of x."""


class ValueInputs(NamedTuple):
    """Everything that a value source may look at."""

    x: Tensor
    """The normed residual stream, (B, T, C)."""
    x0: Tensor
    """The initial token embedding, (B, T, C)."""
    token_ids: Tensor
    """(B, T), int64."""
    first_value: Tensor | None
    """The first layer's value, (B, T, V); None inside the first layer."""


class ValueSource(nn.Module):
    """One way of computing value vectors.

    Recipes name the ones below by their ``name``, a class of somebody's own by its class path.
    """

    n_projection: ClassVar[int] = 0
    """How often the source applies the layer's own W_V."""
    is_context: ClassVar[bool] = False
    """Whether this is the layer's standard value x W_V."""
    skips_first_layer: ClassVar[bool] = False
    """Whether named layer sets leave out layer 0."""
    shareable: ClassVar[bool] = False
    """Whether one instance can serve all target layers."""
    gateable: ClassVar[bool] = False
    """Whether coefficient: gate makes sense."""
    reads_token_ids: ClassVar[bool] = True
    """Whether values depend on token ids, so that embeddings alone are not enough."""
    value_cache: ClassVar[bool] = True
    """Whether decoding must keep the layer's own values. False: `reserve` and `attend_past` say
    what it keeps instead."""
    optimizer_groups: ClassVar[dict[str, str]] = {}
    """Optimizer group by parameter name; a parameter that is not named is a Muon matrix."""

    def __init_subclass__(cls, name: str | None = None):
        """Makes the class known to recipes; one of the package by a short ``name`` too."""
        super().__init_subclass__()
        register(cls, name)

    def __init__(self, config: "TransformerConfig"):
        super().__init__()

    def forward(self, inputs: ValueInputs, projection: nn.Module | None) -> Tensor:
        """The values, (B, T, V); ``projection`` is the layer's W_V where it has one."""
        raise NotImplementedError

    def reserve(self, past: "LayerCache") -> None:
        """Sets aside what `attend_past` reads."""

    def attend_past(
        self, inputs: ValueInputs, q_BHTD: Tensor, k_BKSD: Tensor, mask: "Mask", past: "LayerCache"
    ) -> Tensor:
        """Attention (B, H, T, D) of new tokens to past and new values, where value_cache is False.

        ``inputs`` are those of the new tokens; S keys, the new tokens' included.
        """
        raise NotImplementedError

    def vectors_read(self, n_past: int) -> int:
        """How many value vectors decoding one token after ``n_past`` reads at most."""
        return n_past

    def matmul_parameters(self) -> int:
        """Parameters of its own that one token is multiplied with; looking up a row is none."""
        return 0

    def initialise(
        self, values: "LayerValues", prefix: str, embedding: Tensor, fill: Initialiser
    ) -> None:
        """Fills the source's parameters. ``prefix`` is the name of ``values`` in the model and
        ``embedding`` what the token embedding starts with."""


class ContextValue(ValueSource, name="context"):
    """Standard attention: V = x W_V."""

    n_projection = 1
    is_context = True
    reads_token_ids = False

    def forward(self, inputs, projection):
        return projection(inputs.x)


class FirstLayerValue(ValueSource, name="first_layer"):
    """The value that the first layer computed."""

    skips_first_layer = True
    reads_token_ids = False
    value_cache = False

    def forward(self, inputs, projection):
        return inputs.first_value

    def reserve(self, past):
        past.keep_first_values()

    def attend_past(self, inputs, q_BHTD, k_BKSD, mask, past):
        v_BTKD = inputs.first_value.unflatten(-1, (k_BKSD.shape[1], -1))
        return attend_values(q_BHTD, k_BKSD, past.values.extend(v_BTKD), mask)


class InitialEmbeddingValue(ValueSource, name="initial_embedding"):
    """The layer's own W_V applied to the initial token embedding, normed once more."""

    n_projection = 1
    reads_token_ids = False

    def forward(self, inputs, projection):
        return projection(rms_norm(inputs.x0))


class BankOfValues(ValueSource, name="bank"):
    """A learned table of value vectors, one row per token id (arXiv 2606.02780).

    Initialised to ``W_V RMSNorm(embedding)``, with W_V drawn as the layer's value matrix would be
    and then dropped: at step 0 the layer attends exactly as with values from the embedding.
    """

    shareable = True
    gateable = True
    value_cache = False
    optimizer_groups = {"table": "table"}

    def __init__(self, config: "TransformerConfig"):
        super().__init__(config)
        self.table = nn.Parameter(torch.empty(config.padded_vocab_size, config.d_value))
        self.host: HostTable | None = None

    def offload(self, host: "HostTable") -> None:
        """Takes the table from elsewhere, for inference; this module then holds none."""
        self.host, self.table = host, None

    def forward(self, inputs, projection):
        if self.host is None:
            return F.embedding(inputs.token_ids, self.table)
        rows = self.host.take(inputs.token_ids.flatten().cpu())
        return rows.to(inputs.x).unflatten(0, inputs.token_ids.shape)

    def reserve(self, past):
        past.keep_token_ids()
        if self.host is not None:
            past.keep_rows(self.host)

    def attend_past(self, inputs, q_BHTD, k_BKSD, mask, past):
        ids, table = (past.token_ids, self.table) if self.host is None else past.rows(self.host)
        return attend_bank(q_BHTD, k_BKSD, ids, table, mask)

    def vectors_read(self, n_past):
        return min(n_past, len(self.table))

    def initialise(self, values, prefix, embedding, fill):
        bound = (3 / embedding.shape[1]) ** 0.5
        if values.gate is not None:
            fill.uniform(f"{prefix}.source.table", self.table, -bound, bound)
            return
        projection = embedding.new_empty(self.table.shape[1], embedding.shape[1])
        stream = fill.stream(f"{prefix}.projection.weight")
        projection.uniform_(-bound, bound, generator=stream)
        fill.fill(self.table, rms_norm(embedding) @ projection.T)


class LayerValues(nn.Module):
    """The value vectors of one attention layer.

    A target layer computes ``coefficient * source`` or, with add_context, ``a * x W_V +
    coefficient * source``; every other layer x W_V.
    """

    optimizer_groups: ClassVar[dict[str, str]] = {
        "coefficient": "coefficient",
        "context_coefficient": "context_coefficient",
    }

    def __init__(self, config: "TransformerConfig", layer: int, shared: ValueSource | None = None):
        """``shared`` is a source that another layer owns."""
        super().__init__()
        value, is_target = config.value, layer in config.target_layers
        source = source_class(value.source) if is_target else ContextValue
        self.add_context = is_target and value.add_context
        self.n_projection = source.n_projection + self.add_context
        self.projection = self.gate = self.coefficient = self.context_coefficient = None
        self.constant = 1.0

        if self.n_projection:
            self.projection = Linear(config.d_model, config.d_value)
        # A tuple hides a borrowed module from PyTorch: only its owner stores and trains it.
        self._borrowed = () if shared is None else (shared,)
        self.source = None if shared is not None else source(config)

        if is_target and value.coefficient == "learned":
            self.coefficient = nn.Parameter(torch.empty(1))
            if self.add_context:
                self.context_coefficient = nn.Parameter(torch.empty(1))
        elif is_target and value.coefficient == "gate":
            self.gate = Linear(GATE_CHANNELS, config.n_kv_head)
        elif is_target:
            self.constant = float(value.coefficient)

    @property
    def _source(self) -> ValueSource:
        return self._borrowed[0] if self._borrowed else self.source

    @property
    def value_cache(self) -> bool:
        """Whether decoding must keep this layer's own values."""
        return self.add_context or self._source.value_cache

    @property
    def scale(self) -> Tensor | float:
        """What the source's values are multiplied by, where no gate says so for each token."""
        return self.constant if self.coefficient is None else self.coefficient

    @property
    def bank(self) -> BankOfValues | None:
        """The table whose rows, times one number, are this layer's values; None: there is more to
        them, so that ids are not enough."""
        is_bank = isinstance(self._source, BankOfValues) and not self.add_context
        return self._source if is_bank else None

    def vectors_read(self, n_past: int) -> int:
        """How many value vectors decoding one token after ``n_past`` reads at most."""
        return n_past if self.value_cache else self._source.vectors_read(n_past)

    def reserve(self, past: "LayerCache") -> None:
        """Sets aside what decoding keeps of the values."""
        if self.value_cache:
            past.keep_values()
        else:
            self._source.reserve(past)

    def attend_past(
        self, inputs: ValueInputs, q_BHTD: Tensor, k_BKSD: Tensor, mask: "Mask", past: "LayerCache"
    ) -> tuple[Tensor, Tensor | None]:
        """Attention (B, H, T, D) of new tokens to everything kept, and their values (B, T, V).

        The values are None where they are not kept: a coefficient then scales what was attended.
        """
        if self.value_cache:
            value = self(inputs)
            v_BKSD = past.values.extend(value.unflatten(-1, (k_BKSD.shape[1], -1)))
            return attend_values(q_BHTD, k_BKSD, v_BKSD, mask), value
        return self.scale * self._source.attend_past(inputs, q_BHTD, k_BKSD, mask, past), None

    def forward(self, inputs: ValueInputs) -> Tensor:
        """(B, T, V)."""
        value = self._source(inputs, self.projection)
        if self.gate is not None:
            gate = 3 * torch.sigmoid(self.gate(inputs.x[..., :GATE_CHANNELS]))
            per_head = value.unflatten(-1, (gate.shape[-1], -1))
            return self.projection(inputs.x) + (gate.unsqueeze(-1) * per_head).flatten(-2)
        scale = self.scale
        if not self.add_context:
            return value if self.coefficient is None and scale == 1 else scale * value
        context_scale = scale if self.coefficient is None else self.context_coefficient
        return context_scale * self.projection(inputs.x) + scale * value

    def matmul_parameters(self) -> int:
        """Parameters that one token is multiplied with; a matrix applied twice counts twice."""
        projection = 0 if self.projection is None else self.projection.weight.numel()
        gate = 0 if self.gate is None else self.gate.weight.numel()
        return self.n_projection * projection + gate + self._source.matmul_parameters()

    def initialise(self, prefix: str, embedding: Tensor, fill: Initialiser) -> None:
        """Fills all parameters; ``prefix`` is this module's name in the model."""
        if self.projection is not None:
            bound = (3 / embedding.shape[1]) ** 0.5
            fill.uniform(f"{prefix}.projection.weight", self.projection.weight, -bound, bound)
        if self.gate is not None:
            fill.uniform(f"{prefix}.gate.weight", self.gate.weight, 0, 0.02)
        if self.coefficient is not None:
            fill.constant(self.coefficient, 0 if self.add_context else 1)
        if self.context_coefficient is not None:
            fill.constant(self.context_coefficient, 1)
        if self.source is not None:
            self.source.initialise(self, prefix, embedding, fill)


def build_layer_values(config: "TransformerConfig") -> list[LayerValues]:
    """One `LayerValues` per layer; a shared source belongs to the first target layer."""
    layers, shared = [], None
    for layer in range(config.n_layer):
        is_target = layer in config.target_layers
        layers.append(LayerValues(config, layer, shared if is_target else None))
        if config.value.shared and is_target and shared is None:
            shared = layers[-1].source
    return layers
