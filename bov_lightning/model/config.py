"""The shape of the network, as typed dataclasses that refuse impossible combinations when built."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from bov_lightning.errors import UserError
from bov_lightning.kinds import Range, check_least, read_settings
from bov_lightning.model.lookup import source_class

LAYER_SETS = {
    "every": lambda layer, n_layer: True,
    "every_second": lambda layer, n_layer: layer % 2 == (n_layer - 1) % 2,
    "second_half": lambda layer, n_layer: layer >= n_layer // 2,
    "last_two_thirds": lambda layer, n_layer: layer >= n_layer // 3,
    "last_third": lambda layer, n_layer: layer >= 2 * n_layer // 3,
}


@dataclass(frozen=True)
class ValueConfig:
    """How the target layers get their value vectors. All other layers use x W_V."""

    source: str = "context"
    """Where a value comes from: context (x W_V), first_layer (the first layer's value), layer (that
    of another lower layer), key (the layer's keys before rotation), initial_embedding (x0 W_V),
    bank (a learned table, looked up by token id), ngram_bank (by the tokens just before, too), or
    the class path of a source of your own, such as low_rank_bank.LowRankBank."""

    layers: Annotated[
        Literal["every", "every_second", "second_half", "last_two_thirds", "last_third"]
        | list[int],
        Range(0, 9_999),
    ] = "last_third"
    """The target layers: a named set, or a list of layer indices that starts at 0."""

    coefficient: Annotated[
        Literal["learned", "learned_per_channel", "gate"] | float,
        Range(-(10**6), 10**6, soft=True),
    ] = 1.0
    """What the source is multiplied by: one learned scalar per layer, or one per value channel, an
    input-dependent gate per key-value head, or a fixed number."""

    add_context: bool = False
    """Whether to add the source to x W_V instead of replacing it. A fixed number then multiplies
    both terms; learned gives a*V + b*source (a starts at 1, b at 0), learned_per_channel the same
    by channel; gate gives V + gate*source."""

    shared: bool = False
    """Whether all target layers share one table (a bank, or a source of your own that can)."""

    source_args: dict[str, Any] = field(default_factory=dict)
    """Settings of the source, those that its class has; an overlay that names a source begins
    anew."""

    gate_channels: Annotated[int, Range(1, 2**20)] = 12
    """With coefficient gate: how many channels of its inputs the gate reads, the first ones."""

    gate_factor: Annotated[float, Range(above=0, most=10**6)] = 3.0
    """With coefficient gate: gate = gate_factor * sigmoid(W inputs)."""

    gate_inputs: Literal["x", "x_and_row"] = "x"
    """With coefficient gate: what the gate reads: the normed residual stream, or that and the
    source's value."""

    def __post_init__(self):
        source = source_class(self.source)
        check_least(self, "value")
        found = read_settings(source.args_class, self.source_args, "value.source_args")
        # Spelled out, so that what stores a configuration stores the defaults of its day.
        object.__setattr__(self, "source_args", asdict(found))
        if self.shared and not source.shareable:
            raise UserError(
                f"value.shared needs a source with a table, such as bank, not {self.source}: "
                "set shared: false"
            )
        if self.coefficient == "gate":
            if not source.gateable:
                raise UserError(f"value.coefficient gate needs source bank, not {self.source}")
            if not self.add_context:
                raise UserError(
                    "value.coefficient gate means V + gate*source: set add_context: true"
                )
        else:
            for name in ("gate_channels", "gate_factor", "gate_inputs"):
                if getattr(self, name) != getattr(ValueConfig, name):
                    raise UserError(
                        f"value.{name} is {getattr(self, name)}, but only coefficient: gate has a "
                        f"gate, and coefficient is {self.coefficient}: leave it out"
                    )
        if self.add_context and source.is_context:
            raise UserError("value.add_context would add context to itself: set add_context: false")
        if isinstance(self.layers, list):
            if not self.layers:
                raise UserError("value.layers is an empty list: for no target layers use context")
            if len(set(self.layers)) < len(self.layers):
                raise UserError(f"value.layers names a layer twice: {self.layers}")
            if 0 in self.layers and source.skips_first_layer:
                raise UserError(
                    f"value.layers holds 0, but {self.source} reads the value of a layer below: "
                    "there is none below layer 0"
                )

    @property
    def args(self) -> Any:
        """``source_args`` as the source's own dataclass."""
        return source_class(self.source).args_class(**self.source_args)


@dataclass(frozen=True)
class TransformerConfig:
    """The network's shape."""

    n_layer: Annotated[int, Range(1, 10_000)] = 12
    """Number of layers."""

    n_head: Annotated[int, Range(1, 2**20)] = 6
    """Query heads per layer; the head dimension is d_model / n_head."""

    n_kv_head: Annotated[int, Range(1, 2**20)] = 6
    """Key and value heads per layer; divides n_head."""

    d_model: Annotated[int, Range(24, 2**20)] = 768
    """Width of the residual stream, of which the smear reads 24 channels."""

    vocab_size: Annotated[int | None, Range(2, 2**31)] = None
    """Number of token ids. null: taken from the data's tokenizer."""

    sequence_len: Annotated[int, Range(1, 2**24)] = 2048
    """Tokens per training row."""

    window_pattern: str = "SSSL"
    """Attention windows, tiled over the layers: L sees everything before it, S a quarter of
    sequence_len (rounded up to 128). The last layer is always L."""

    document_start: Annotated[int | None, Range(0, 2**31, soft=True)] = None
    """Token id that starts a document: attention and smear then never reach back across it. null:
    a row is one text, as in the paper."""

    value: ValueConfig = field(default_factory=ValueConfig)
    """Where value vectors come from."""

    d_mlp: Annotated[int | Literal["like_bank"] | None, Range(1, 2**20)] = None
    """Width of the MLPs. null: 4 x d_model. like_bank: so wide that the network, with standard
    values, holds as many parameters as with a bank in its last third of layers, to within the
    rounding to a multiple of 16: the control of the bank's parameters."""

    def __post_init__(self):
        if self.d_model < 24:
            raise UserError(f"model.config.d_model is {self.d_model}: the smear reads 24 channels")
        check_least(self, "model.config")
        if self.d_model % self.n_head:
            fitting = [n for n in range(1, self.d_model + 1) if self.d_model % n == 0]
            nearest = min(fitting, key=lambda n: abs(n - self.n_head))
            raise UserError(
                f"model.config.d_model {self.d_model} is not divisible by n_head {self.n_head}: "
                f"the nearest n_head that divides it is {nearest}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"d_model / n_head is {self.head_dim}, but rotary embeddings need an even head "
                "dimension: change d_model or n_head"
            )
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"model.config.n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}"
            )
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(
                f"model.config.window_pattern {self.window_pattern!r}: use the letters S and L"
            )
        if self.d_mlp == "like_bank" and not source_class(self.value.source).is_context:
            raise UserError(
                f"model.config.d_mlp like_bank is the control of a bank, so it needs standard "
                f"values: set value.source: context, not {self.value.source}"
            )
        source_class(self.value.source).check(self)
        self._check_gate()
        if isinstance(self.value.layers, list):
            outside = [layer for layer in self.value.layers if not 0 <= layer < self.n_layer]
            if outside:
                raise UserError(
                    f"value.layers holds {outside[0]}, but the model has layers 0 to "
                    f"{self.n_layer - 1}"
                )
            lowest, read = min(self.value.layers), self.read_layer
            if read is not None and lowest <= read:
                raise UserError(
                    f"value.layers holds {lowest}, but {self.value.source} reads the value that "
                    f"layer {read} computes: target layers lie above it"
                )
        elif not self.target_layers:
            raise UserError(
                f"value.layers {self.value.layers} selects no layer of {self.n_layer} for source "
                f"{self.value.source}: add layers or choose another set"
            )

    def _check_gate(self) -> None:
        value = self.value
        least = self.d_value if value.gate_inputs == "x_and_row" else self.d_model
        if value.coefficient == "gate" and value.gate_channels > min(least, self.d_model):
            raise UserError(
                f"value.gate_channels is {value.gate_channels}, but what the gate reads has only "
                f"{min(least, self.d_model)} channels"
            )

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.d_model // self.n_head

    @property
    def d_value(self) -> int:
        """Channels of all value heads of one layer: n_kv_head * head_dim."""
        return self.n_kv_head * self.head_dim

    @property
    def mlp_width(self) -> int:
        """Channels inside each MLP: ``d_mlp``, spelled out."""
        if self.d_mlp != "like_bank":
            return self.d_mlp or 4 * self.d_model
        is_bank = LAYER_SETS["last_third"]
        n_bank = sum(is_bank(layer, self.n_layer) for layer in range(self.n_layer))
        # Each bank has a table where the layer would have a projection.
        added = n_bank * (self.padded_vocab_size - self.d_model) * self.d_value
        wider = added / (2 * self.n_layer * self.d_model)
        return max(16, 16 * round((4 * self.d_model + wider) / 16))

    @property
    def max_context(self) -> int:
        """Tokens that decoding makes room for unless told otherwise: 10 training rows."""
        return 10 * self.sequence_len

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 64, the rows of embedding, tables and head."""
        if self.vocab_size is None:
            raise UserError("model.config.vocab_size is not set and no tokenizer filled it in")
        return -(-self.vocab_size // 64) * 64

    @property
    def read_layer(self) -> int | None:
        """The layer whose value the source reads in the layers above it; None: of no layer."""
        return source_class(self.value.source).reads_layer(self)

    @property
    def target_layers(self) -> list[int]:
        """The layers whose values come from ``value.source``."""
        if isinstance(self.value.layers, list):
            return sorted(self.value.layers)
        first = 0 if self.read_layer is None else self.read_layer + 1
        is_target = LAYER_SETS[self.value.layers]
        return [layer for layer in range(first, self.n_layer) if is_target(layer, self.n_layer)]

    @property
    def windows(self) -> list[int | None]:
        """Per layer, how many tokens to the left of itself a token sees; None: all of them."""
        short = -(-self.sequence_len // 4 // 128) * 128
        pattern = self.window_pattern
        windows = [short if pattern[i % len(pattern)] == "S" else None for i in range(self.n_layer)]
        windows[-1] = None
        return windows
