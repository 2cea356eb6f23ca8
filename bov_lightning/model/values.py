"""Value sources: where the value vectors of an attention layer come from.

A source is one class. It owns its parameters, their initialisation and optimizer group, its forward
pass, and says what decoding must keep for it. `LayerValues` combines a source with a coefficient
and with the layer's context value x W_V; the variants of the paper are such combinations.

Shapes: B batch, T time, C = d_model, V = n_kv_head * head_dim, R table rows per token.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bov_lightning.errors import UserError
from bov_lightning.kinds import Range
from bov_lightning.model.decode import attend_bank, attend_values, sum_rows
from bov_lightning.model.layers import Initialiser, Linear, rms_norm
from bov_lightning.model.lookup import register, source_class
from bov_lightning.model.ngrams import NO_KEY, largest_prime, ngram_keys
from bov_lightning.model.turned_keys import attend_keys, turn_to_keep

if TYPE_CHECKING:
    from bov_lightning.model.attention import Mask
    from bov_lightning.model.cache import LayerCache
    from bov_lightning.model.config import TransformerConfig
    from bov_lightning.model.offload import HostTable

FREQUENT_AMONG = 2**20
"""Tokens of the training text in which the most frequent n-grams are counted."""


class ValueInputs(NamedTuple):
    """Everything that a value source may look at."""

    x: Tensor
    """The normed residual stream, (B, T, C)."""
    x0: Tensor
    """The initial token embedding, (B, T, C)."""
    token_ids: Tensor
    """(B, T), int64. Decoding, these are the new tokens alone: what a value needs of those before
    its own is in ``ngrams``."""
    layer_value: Tensor | None
    """The value of the layer that the source reads (`ValueSource.reads_layer`), the first one
    unless it says otherwise, (B, T, V); None up to that layer."""
    ngrams: Tensor
    """(B, T, 1 + `ValueSource.reach`), int64: each token's own id, then that of the one before and
    so on; -1 beyond the start of its row or document."""
    row_ids: Tensor
    """What `ValueSource.row_ids` made of them, (B, T) or (B, T, R)."""
    key: Tensor | None = None
    """The layer's normed keys before rotation, (B, T, V), where the source reads them."""

    @property
    def first_value(self) -> Tensor | None:
        """``layer_value`` of a source that reads the first layer's."""
        return self.layer_value


@dataclass(frozen=True)
class NoArgs:
    """The settings of a source that has none."""


class ValueSource(nn.Module):
    """One way of computing value vectors.

    Recipes name the ones below by their ``name``, a class of somebody's own by its class path.
    """

    args_class: ClassVar[type] = NoArgs
    """The dataclass of ``value.source_args``: annotated fields, with docstrings that say what they
    mean. ``config.value.args`` is an instance of it."""
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
    reach: int = 0
    """How many tokens before its own a value depends on, besides through the residual stream; what
    a setting decides is set in ``__init__``."""
    learns_from: int = 0
    """Tokens of the training text that `learn` is shown before a run's first step."""
    value_cache: ClassVar[bool] = True
    """Whether decoding must keep the layer's own values. False: `reserve` and `attend_past` say
    what it keeps instead."""
    capturable: ClassVar[bool] = True
    """Whether decoding one token is the same operations on the same shapes at every step, so that
    a CUDA graph can replay them. False: its `forward` or `attend_past` reads numbers back
    (`.item()`, `nonzero`), or counts in Python."""
    reads_keys: ClassVar[bool] = False
    """Whether values are made of the layer's keys. Without a value cache the source then keeps the
    keys itself: `attend_past` is given None for them."""
    optimizer_groups: ClassVar[dict[str, str | tuple[str, float]]] = {}
    """Optimizer group by parameter name, or (group, factor on its learning rate); a parameter that
    is not named is a Muon matrix."""

    def __init_subclass__(cls, name: str | None = None):
        """Makes the class known to recipes; one of the package by a short ``name`` too."""
        super().__init_subclass__()
        register(cls, name)

    @classmethod
    def check(cls, config: "TransformerConfig") -> None:
        """Raises a `UserError` where the source does not fit the network, whose vocab_size may not
        be known yet."""

    @classmethod
    def reads_layer(cls, config: "TransformerConfig") -> int | None:
        """The layer whose value the source reads: its target layers all lie above it."""
        return 0 if cls.skips_first_layer else None

    @classmethod
    def reads_as_bank(cls) -> bool:
        """Whether values are sums of rows of one table, which may lie outside of the device."""
        return False

    def __init__(self, config: "TransformerConfig"):
        super().__init__()

    def row_ids(self, ngrams: Tensor, positions: Tensor) -> Tensor:
        """The rows of a table that tokens' values are made of, (B, T) or (B, T, R), int64.

        A function of its arguments, and of buffers that are the same in all layers: that of the
        first target layer is called, once for all, when tokens arrive, and decoding keeps what it
        gives.

        Args:
            ngrams: as in `ValueInputs`.
            positions: (B or 1, T), int64: how many tokens of its row or document stand before each.
        """
        return ngrams[..., 0]

    def learn(self, ngrams: Tensor) -> None:
        """Fills buffers from training text: (N, T, 1 + reach), the same on every rank."""

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


@dataclass(frozen=True)
class LayerArgs:
    """Settings of `layer`."""

    layer: Annotated[Literal["third", "half"] | int, Range(0, 9_999)] = 0
    """The layer whose value is read, counted from 0; third and half: n_layer // 3, n_layer // 2.
    Target layers lie above it."""


class LayerValue(ValueSource, name="layer"):
    """The value that a lower layer computed."""

    args_class = LayerArgs
    skips_first_layer = True
    reads_token_ids = False
    value_cache = False

    @classmethod
    def reads_layer(cls, config):
        layer = config.value.args.layer
        parts = {"third": 3, "half": 2}
        return config.n_layer // parts[layer] if layer in parts else layer

    @classmethod
    def check(cls, config):
        read, n_layer = cls.reads_layer(config), config.n_layer
        if read >= n_layer - 1:
            raise UserError(
                f"value.source {config.value.source} reads the value of layer {read}, so it "
                f"selects no layer of {n_layer}: none lies above that"
            )

    def __init__(self, config):
        super().__init__(config)
        self.layer = self.reads_layer(config)

    def forward(self, inputs, projection):
        return inputs.layer_value

    def reserve(self, past):
        past.keep_values_of(self.layer)

    def attend_past(self, inputs, q_BHTD, k_BKSD, mask, past):
        v_BTKD = inputs.layer_value.unflatten(-1, (k_BKSD.shape[1], -1))
        return attend_values(q_BHTD, k_BKSD, past.values.extend(v_BTKD), mask)


class FirstLayerValue(LayerValue, name="first_layer"):
    """The value that the first layer computed: `layer` without a choice."""

    args_class = NoArgs

    @classmethod
    def reads_layer(cls, config):
        return 0


class KeyValue(ValueSource, name="key"):
    """The layer's normed keys before rotation: neither a W_V nor a value cache.

    As Gemma 4's attention_k_eq_v, and "Q-K=V" of arXiv 2606.04032.
    """

    reads_token_ids = False
    value_cache = False
    reads_keys = True

    def forward(self, inputs, projection):
        return inputs.key

    def attend_past(self, inputs, q_BHTD, k_BKSD, mask, past):
        span = past.span
        key_BTKD = inputs.key.unflatten(-1, (-1, q_BHTD.shape[3]))
        kept_BKSD = past.keys.extend(turn_to_keep(key_BTKD, span.step.positions_BT))
        in_order = not (span.wraps or span.joins)
        return attend_keys(q_BHTD, kept_BKSD, span.key_positions, mask, in_order)

    def vectors_read(self, n_past):
        return 0


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

    A subclass may have more rows, from ``n_vocab`` on and zero at first, and pick them by
    `row_ids`: a value is then the sum of all of a token's rows, each times its weight.
    """

    shareable = True
    gateable = True
    value_cache = False
    optimizer_groups = {"table": "table"}
    row_weights: tuple[float, ...] | None = None
    """What each of a token's R rows is multiplied by; None: by 1."""

    def __init__(self, config: "TransformerConfig", n_more: int = 0):
        """``n_more``: rows beside those of the token ids."""
        super().__init__(config)
        self.n_vocab = config.padded_vocab_size
        self.table = nn.Parameter(torch.empty(self.n_vocab + n_more, config.d_value))
        self.host: HostTable | None = None

    def offload(self, host: "HostTable") -> None:
        """Takes the table from elsewhere, for inference; this module then holds none."""
        self.host, self.table = host, None

    def train_on_host(self, host: "HostTable", table: nn.Parameter) -> None:
        """Takes the table from elsewhere, for training: as a parameter that nobody moves."""
        self.host, self.table = host, table

    @property
    def trains_on_host(self) -> bool:
        """Whether the table is a parameter in the host's memory."""
        return self.host is not None and self.table is not None

    def _apply(self, fn, recurse=True):
        if not self.trains_on_host:
            return super()._apply(fn, recurse)
        # Whatever moves a module to a device goes through here.
        table, self._parameters["table"] = self.table, None
        try:
            return super()._apply(fn, recurse)
        finally:
            self._parameters["table"] = table

    @classmethod
    def reads_as_bank(cls):
        # They are found where `offload` and `train_on_host` have put them.
        return all(
            getattr(cls, name) is getattr(BankOfValues, name) for name in ("forward", "attend_past")
        )

    def forward(self, inputs, projection):
        row_ids = inputs.row_ids
        if self.host is None:
            rows = F.embedding(row_ids, self.table)
        else:
            rows = self.host.look_up(row_ids, inputs.x)
        return sum_rows(rows, self.weights(row_ids))

    def weights(self, row_ids: Tensor) -> tuple[float, ...] | None:
        """`row_weights` of the rows (B, T) or (B, T, R); None: a value is one row."""
        ones = (1.0,) * row_ids.shape[2] if row_ids.dim() == 3 else None
        return self.row_weights or ones

    def reserve(self, past):
        past.keep_row_ids()
        if self.host is not None:
            past.keep_rows(self.host)

    def attend_past(self, inputs, q_BHTD, k_BKSD, mask, past):
        row_ids, table = (past.row_ids, self.table) if self.host is None else past.rows(self.host)
        return attend_bank(q_BHTD, k_BKSD, row_ids, table, mask, self.weights(row_ids))

    def vectors_read(self, n_past):
        n_row = self.host.n_row if self.table is None else len(self.table)
        return min(n_past * len(self.row_weights or (1.0,)), n_row)

    def initialise(self, values, prefix, embedding, fill):
        bound = (3 / embedding.shape[1]) ** 0.5
        shape = (self.n_vocab, self.table.shape[1])
        if values.gate is not None:
            stream = fill.stream(f"{prefix}.source.table")
            rows = embedding.new_empty(shape).uniform_(-bound, bound, generator=stream)
        else:
            projection = embedding.new_empty(shape[1], embedding.shape[1])
            stream = fill.stream(f"{prefix}.projection.weight")
            projection.uniform_(-bound, bound, generator=stream)
            rows = rms_norm(embedding) @ projection.T
        if len(self.table) > self.n_vocab:
            # Large, so there once.
            whole = rows.new_zeros(len(self.table), shape[1])
            whole[: self.n_vocab] = rows
            rows = whole
        fill.fill(self.table, rows)


@dataclass(frozen=True)
class NgramArgs:
    """Settings of `ngram_bank`."""

    n_row: Annotated[int, Range(2, 2**31)] = 65_536
    """Rows for n-grams, beside those of the token ids: the frequent ones, and then as many for all
    others as the largest prime that fits."""

    reach: Annotated[int, Range(1, 15)] = 1
    """Tokens before its own that a value depends on: 1 bigrams, 2 also trigrams, and so on."""

    factor: Annotated[float, Range(above=0, most=10**6)] = 1.0
    """What the rows of n-grams are multiplied by. They start at zero and AdamW's steps do not
    depend on the size of gradients, so this is their learning rate in units of table_lr."""

    frequent: Annotated[int, Range(0, 2**31)] = 0
    """How many n-grams, the most frequent ones of the training text, have a row of their own."""

    position_period: Annotated[int | None, Range(2, 2**31)] = None
    """The control of the parameters: rows are picked by a token's id and its position modulo this
    number, which say nothing of the tokens before. null: by n-grams."""


class NgramBank(BankOfValues, name="ngram_bank"):
    """A bank whose values depend on the tokens just before as well.

    v_t = T[id_t] + factor * (T[row of the bigram] + T[row of the trigram] + ...): a row per token
    id, as in a bank, and rows that n-grams share by a hash, modulo a prime (as in arXiv 2601.07372;
    tables by n-gram in attention's values: karpathy/nanochat#854). The frequent n-grams may have
    rows of their own (as in arXiv 2604.21724). At step 0 it equals the bank.
    """

    args_class = NgramArgs

    @classmethod
    def check(cls, config):
        args = config.value.args
        if args.n_row < args.frequent + 2:
            raise UserError(
                f"value.source_args.n_row is {args.n_row}, but {args.frequent} frequent n-grams "
                "have a row of their own and at least 2 are for all others: give more rows, or "
                "fewer frequent n-grams"
            )
        if args.position_period is not None and args.frequent:
            raise UserError(
                "value.source_args.frequent counts n-grams, but position_period picks rows without "
                "them: set one of the two"
            )

    def __init__(self, config):
        args = config.value.args
        self._n_hashed = largest_prime(args.n_row - args.frequent)
        super().__init__(config, args.frequent + self._n_hashed)
        self._period = args.position_period
        self.reach = args.reach if self._period is None else 0
        self.row_weights = (1.0, *(args.factor,) * max(self.reach, 1))
        self.learns_from = FREQUENT_AMONG if args.frequent else 0
        frequent = torch.full((args.frequent,), NO_KEY) if args.frequent else None
        self.register_buffer("frequent", frequent)

    def row_ids(self, ngrams, positions):
        picked_by = ngrams
        if self._period is not None:
            phase = (positions % self._period).expand(ngrams.shape[:2])
            picked_by = torch.stack((ngrams[..., 0], phase), dim=-1)
        keys = ngram_keys(picked_by)
        n_own = 0 if self.frequent is None else len(self.frequent)
        rows = keys.remainder(self._n_hashed) + (self.n_vocab + n_own)
        if n_own:
            at = torch.searchsorted(self.frequent, keys).clamp(max=n_own - 1)
            rows = torch.where(self.frequent[at] == keys, at + self.n_vocab, rows)
        return torch.cat((ngrams[..., :1], rows), dim=-1)

    def learn(self, ngrams):
        """Gives the n-grams that are most frequent there rows of their own."""
        if self.frequent is None:
            return
        keys, count = ngram_keys(ngrams).flatten().unique(return_counts=True)
        best = count.argsort(descending=True, stable=True)[: len(self.frequent)]
        found = keys[best].sort().values.to(self.frequent.device)
        self.frequent.fill_(NO_KEY)[: len(found)] = found

    def initialise(self, values, prefix, embedding, fill):
        super().initialise(values, prefix, embedding, fill)
        if self.frequent is not None:
            fill.fill(self.frequent, torch.full(self.frequent.shape, NO_KEY, device="cpu"))


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
        self.value_cache: bool = self.add_context or self._source.value_cache
        """Whether decoding must keep this layer's own values."""
        self.reads_keys: bool = self._source.reads_keys
        """Whether the values are made of the layer's keys."""
        self.keeps_keys: bool = self.reads_keys and not self.value_cache
        """Whether decoding leaves the keys to the source."""
        if self._source.reach >= config.sequence_len:
            raise UserError(
                f"value.source {value.source} looks {self._source.reach} tokens back, but rows "
                f"have {config.sequence_len}: give it a smaller reach"
            )

        sizes = {"learned": 1, "learned_per_channel": config.d_value}
        if is_target and value.coefficient in sizes:
            self.coefficient = nn.Parameter(torch.empty(sizes[value.coefficient]))
            if self.add_context:
                self.context_coefficient = nn.Parameter(torch.empty_like(self.coefficient))
        elif is_target and value.coefficient == "gate":
            self.gate_channels, self.gate_factor = value.gate_channels, value.gate_factor
            self.gate_reads_row = value.gate_inputs == "x_and_row"
            n_input = 2 if self.gate_reads_row else 1
            self.gate = Linear(n_input * value.gate_channels, config.n_kv_head)
        elif is_target:
            self.constant = float(value.coefficient)

    @property
    def _source(self) -> ValueSource:
        return self._borrowed[0] if self._borrowed else self.source

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can replay the decoding of one token."""
        return self._source.capturable

    @property
    def on_host(self) -> bool:
        """Whether values are made of a table that does not lie on the model's device."""
        return getattr(self._source, "host", None) is not None

    @property
    def bank(self) -> BankOfValues | None:
        """The table whose rows, times coefficients, are this layer's values; None: there is more to
        them, so that the numbers of rows are not enough."""
        source = self._source
        return source if source.reads_as_bank() and not self.add_context else None

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
        y_BHTD = self._source.attend_past(inputs, q_BHTD, k_BKSD, mask, past)
        return self.scaled(y_BHTD), None

    def scaled(self, y_BHTD: Tensor) -> Tensor:
        """Attention (B, H, T, D) to the source's values, times the coefficient."""
        scale = self.constant if self.coefficient is None else self.coefficient
        if self.coefficient is not None and len(scale) > 1:
            scale_KD = scale.unflatten(0, (-1, y_BHTD.shape[3]))
            group = y_BHTD.shape[1] // len(scale_KD)
            scale = scale_KD.repeat_interleave(group, dim=0)[:, None]
        return scale * y_BHTD

    def forward(self, inputs: ValueInputs) -> Tensor:
        """(B, T, V)."""
        value = self._source(inputs, self.projection)
        if self.gate is not None:
            gate = self.gate_factor * torch.sigmoid(self.gate(self._gate_inputs(inputs.x, value)))
            per_head = value.unflatten(-1, (gate.shape[-1], -1))
            return self.projection(inputs.x) + (gate.unsqueeze(-1) * per_head).flatten(-2)
        scale = self.constant if self.coefficient is None else self.coefficient
        if not self.add_context:
            return value if self.coefficient is None and scale == 1 else scale * value
        context_scale = scale if self.coefficient is None else self.context_coefficient
        return context_scale * self.projection(inputs.x) + scale * value

    def _gate_inputs(self, x: Tensor, value: Tensor) -> Tensor:
        read = x[..., : self.gate_channels]
        if not self.gate_reads_row:
            return read
        return torch.cat((read, value[..., : self.gate_channels].to(read.dtype)), dim=-1)

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
