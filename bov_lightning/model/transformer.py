"""The whole network on one page.

Shapes: B batch, T time, C = d_model, V = padded vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bov_lightning.errors import UserError
from bov_lightning.model.attention import (
    Mask,
    allow_many_graphs,
    attend,
    make_masks,
    rotary_angles_at,
    rotate,
)
from bov_lightning.model.cache import Cache
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.layers import Initialiser, Linear, rms_norm, squared_relu
from bov_lightning.model.loss import softcap, softcapped_cross_entropy
from bov_lightning.model.ngrams import look_up, lookup_source, text_positions
from bov_lightning.model.values import LayerValues, ValueInputs, ValueSource, build_layer_values

if TYPE_CHECKING:
    from bov_lightning.model.cache import LayerCache


class Smear(nn.Module):
    """Mixes a little of the previous token in: x_t += lambda * sigmoid(w . x_t[:24]) * x_{t-1}."""

    optimizer_groups = {"strength": "smear", "gate": "smear"}
    n_channel = 24

    def __init__(self):
        super().__init__()
        self.strength = nn.Parameter(torch.empty(1))
        self.gate = nn.Parameter(torch.empty(1, self.n_channel))

    def forward(
        self, x_BTC: Tensor, starts_BT: Tensor | None, previous_B1C: Tensor | None = None
    ) -> Tensor:
        """``starts_BT``: True at tokens that nothing of the one before is mixed into.

        ``previous_B1C``: what came before the first token; without it nothing is mixed into that.
        """
        if previous_B1C is None:
            previous_B1C = torch.zeros_like(x_BTC[:, :1])
        previous_BTC = torch.cat((previous_B1C, x_BTC), dim=1)[:, :-1]
        gate = self.strength * torch.sigmoid(F.linear(x_BTC[..., : self.n_channel], self.gate))
        if starts_BT is not None:
            gate = gate.masked_fill(starts_BT[..., None], 0)
        return x_BTC + gate.to(x_BTC.dtype) * previous_BTC


class MLP(nn.Module):
    """W_2 relu(W_1 x)^2."""

    def __init__(self, d_model: int, d_mlp: int):
        super().__init__()
        self.input = Linear(d_model, d_mlp)
        self.output = Linear(d_mlp, d_model)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.output(squared_relu(self.input(x_BTC)))


class Block(nn.Module):
    """Attention and MLP, each on the normed residual stream."""

    recompute: Callable | None = None
    """What runs the block in training so as to keep less of it, as torch.utils.checkpoint does;
    called with the block and its arguments."""

    def __init__(self, config: TransformerConfig, values: LayerValues, window: int | None):
        super().__init__()
        self.window = window
        self.attention = Attention(config, values)
        self.mlp = MLP(config.d_model, config.mlp_width)

    def forward(self, x_BTC, x0_BTC, tokens, layer_value, rotary, mask, past=None):
        """The residual stream after this block, and the block's value."""
        inputs = ValueInputs(rms_norm(x_BTC), x0_BTC, tokens.ids, layer_value, *tokens[1:])
        attended_BTC, value = self.attention(inputs, rotary, mask, past)
        x_BTC = x_BTC + attended_BTC
        return x_BTC + self.mlp(rms_norm(x_BTC)), value


class WholeText:
    """What `Cache` is to new tokens of a text, for a text that is given whole: it has no past."""

    def __init__(self, config: TransformerConfig, source: ValueSource):
        """``source``: see `lookup_source`."""
        self.config, self.source, self.layers = config, source, [None] * config.n_layer
        self.masks: dict[int | None, Mask] = {}

    def begin(self, token_ids_BT: Tensor, lengths: None, starts_BT: Tensor | None) -> Tensor:
        """The positions of the tokens, (T,); ``starts_BT`` is True where a text begins."""
        self.masks = make_masks(self.config.windows, token_ids_BT, None, starts_BT)
        positions = torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device)
        own = positions[None] if starts_BT is None else text_positions(positions[None], starts_BT)
        self.tokens = look_up(self.source, token_ids_BT, own, starts_BT)
        return positions

    def take_previous(self, x_BTC: Tensor) -> None:
        """What came before the first token: nothing."""

    def finish(self) -> None:
        """Nothing is kept."""


class Head(nn.Module):
    """Soft-capped logits in fp32, or the loss without ever holding all of them."""

    optimizer_groups = {"weight": "head"}

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.weight = nn.Parameter(torch.empty(config.padded_vocab_size, config.d_model))

    def forward(self, x_BTC: Tensor, targets_BT: Tensor | None, reduction: str) -> Tensor:
        padded = self.vocab_size < len(self.weight)
        weight = self.weight[: self.vocab_size] if padded else self.weight
        if targets_BT is None:
            return softcap(F.linear(x_BTC, weight.to(x_BTC.dtype)).float())
        return softcapped_cross_entropy(x_BTC, weight, targets_BT, reduction)


class Embedding(nn.Embedding):
    """Token embedding, filled by `Transformer.initialise` alone."""

    optimizer_groups = {"weight": "embedding"}

    def reset_parameters(self) -> None:
        """Nothing: the default initialisation would be overwritten at once."""


class Transformer(nn.Module):
    """A pre-norm decoder whose deep layers may take their values from elsewhere.

    ``seed`` fixes the initialisation. Every parameter has its own random stream, named after it, so
    that two models of one seed share all weights that both have.
    """

    fetch_rows: Callable[[Tensor], None] | None = None
    """What brings rows of tables in the host's memory to the device before the layers look them up;
    called with their numbers, (B, T) or (B, T, R)."""

    def __init__(self, config: TransformerConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.padded_vocab_size, config.d_model)
        self.smear = Smear()
        self.blocks = nn.ModuleList(
            Block(config, values, window)
            for values, window in zip(build_layer_values(config), config.windows, strict=True)
        )
        self.head = Head(config)
        self.read_layer = config.read_layer or 0
        """The layer whose value other layers may read."""
        if not self.head.weight.is_meta:
            self.initialise(Initialiser(seed))

    def forward(
        self, token_ids_BT: Tensor, targets_BT: Tensor | None = None, reduction: str = "mean",
        *, cache: Cache | None = None, lengths: Tensor | None = None,
        positions_BP: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits (B, T, vocab_size) in fp32; with targets, their negative log-likelihood in nats.

        Args:
            token_ids_BT: int64.
            targets_BT: int64; -1 is not counted.
            reduction: ``mean`` over the counted targets (a scalar), or ``none``: (B, T), for
                evaluation only, since it carries no gradient.
            cache: the past of every row, from `new_cache`; ``token_ids_BT`` are then new tokens
                alone, and join it.
            lengths: (B,) int64, with a cache: how many of a row's tokens are real; the rest is
                padding on the right, whose logits mean nothing. None: all of them.
            positions_BP: (B, P) int64: which of the T positions to compute logits of, so that the
                result is (B, P, vocab_size). None: all.
        """
        x_BTC = self.stream(token_ids_BT, cache=cache, lengths=lengths)
        if positions_BP is not None:
            x_BTC = x_BTC.gather(1, positions_BP[:, :, None].expand(-1, -1, self.config.d_model))
        return self.head(rms_norm(x_BTC), targets_BT, reduction)

    def stream(
        self, token_ids_BT: Tensor, *, cache: Cache | None = None, lengths: Tensor | None = None,
        embedded_BTC: Tensor | None = None, starts_BT: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """The residual stream after the last block, (B, T, C), not normed yet.

        Args:
            token_ids_BT: as in `forward`, and so are ``cache`` and ``lengths``.
            embedded_BTC: stands for the embedding of ``token_ids_BT``.
            starts_BT: bool, without a cache: True at tokens that start a text of their own, which
                sees nothing of what stands before it in the row.
            states: a list to which the stream before each block and after the last is appended.
        """
        config = self.config
        if config.document_start is not None:
            own_BT = token_ids_BT == config.document_start
            starts_BT = own_BT if starts_BT is None else own_BT | starts_BT
        text = WholeText(config, self.lookup_source) if cache is None else cache
        rotary = rotary_angles_at(text.begin(token_ids_BT, lengths, starts_BT), config.head_dim)
        if cache is None and self.fetch_rows is not None:
            self.fetch_rows(text.tokens.row_ids)
        masks = text.masks
        x_BTC = rms_norm(self.embedding(token_ids_BT) if embedded_BTC is None else embedded_BTC)
        rotary = tuple(angle.to(x_BTC.dtype) for angle in rotary)  # once for all layers
        x_BTC = x0_BTC = self.smear(x_BTC, starts_BT, text.take_previous(x_BTC))
        layer_value = None
        for i, (block, past) in enumerate(zip(self.blocks, text.layers, strict=True)):
            if states is not None:
                states.append(x_BTC)
            mask = masks[block.window]
            again = past is None and block.recompute is not None and torch.is_grad_enabled()
            run = partial(block.recompute, block) if again else block
            x_BTC, value = run(x_BTC, x0_BTC, text.tokens, layer_value, rotary, mask, past)
            layer_value = value if i == self.read_layer else layer_value
        text.finish()
        if states is not None:
            states.append(x_BTC)
        return x_BTC

    def compile_blocks(self, **options) -> None:
        """Has torch.compile, which gets ``options``, make one graph per kind of block and mode."""
        allow_many_graphs()
        for block in self.blocks:
            block.compile(**options)

    @property
    def lookup_source(self) -> ValueSource:
        """The source that says for all layers which rows of a table tokens read."""
        return lookup_source(self.config, self.blocks)

    @torch.no_grad()
    def learn(self, token_ids_BT: Tensor) -> None:
        """Shows training text to the value sources that learn from it before they are trained."""
        text, start = WholeText(self.config, self.lookup_source), self.config.document_start
        text.begin(token_ids_BT, None, None if start is None else token_ids_BT == start)
        for block in self.blocks:
            if block.attention.value.source is not None:
                block.attention.value.source.learn(text.tokens.ngrams)

    def new_cache(
        self, batch_size: int, max_context: int, dtype: torch.dtype | None = None
    ) -> Cache:
        """Room for the past of ``batch_size`` texts of up to ``max_context`` tokens each.

        It lies on the model's device, in ``dtype`` (the embedding's if not given).
        """
        weight = self.embedding.weight
        return Cache(
            self.config, self.blocks, batch_size, max_context, dtype or weight.dtype, weight.device
        )

    @torch.no_grad()
    def initialise(self, fill: Initialiser) -> None:
        """Fills every parameter; output projections and the smear start at zero."""
        bound = (3 / self.config.d_model) ** 0.5
        embedding = fill.normal("embedding.weight", self.embedding.weight, 0.8)
        fill.normal("head.weight", self.head.weight, 0.001)
        fill.constant(self.smear.strength, 0)
        smear_bound = Smear.n_channel**-0.5
        fill.uniform("smear.gate", self.smear.gate, -smear_bound, smear_bound)
        for i, block in enumerate(self.blocks):
            name, attention, mlp = f"blocks.{i}", block.attention, block.mlp
            for part in ("query", "key"):
                weight = getattr(attention, part).weight
                fill.uniform(f"{name}.attention.{part}.weight", weight, -bound, bound)
            attention.value.initialise(f"{name}.attention.value", embedding, fill)
            fill.constant(attention.output.weight, 0)
            weight = mlp.input.weight
            fill.uniform(f"{name}.mlp.input.weight", weight, -0.4 * bound, 0.4 * bound)
            fill.constant(mlp.output.weight, 0)
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if not fill.has_filled(tensor):
                raise UserError(
                    f"{name} holds whatever was in memory: the initialise method of value.source "
                    f"{self.config.value.source} must give it to `fill`"
                )

    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 per matrix parameter, 12 per channel and visible key."""
        config = self.config
        linear = [m for block in self.blocks for m in (
            block.attention.query, block.attention.key, block.attention.output,
            block.mlp.input, block.mlp.output,
        )]  # fmt: skip
        matmul = self.head.weight.numel() + sum(m.weight.numel() for m in linear)
        matmul += sum(block.attention.value.matmul_parameters() for block in self.blocks)
        visible = sum(
            min(config.sequence_len if window is None else window, config.sequence_len)
            for window in config.windows
        )
        return 6 * matmul + 12 * config.n_head * config.head_dim * visible

    def rated_parameters(self) -> Iterator[tuple[str, nn.Parameter, str, float]]:
        """(name, parameter, optimizer group, factor on the group's learning rate) of all.

        What no module names in its ``optimizer_groups`` is a matrix.
        """
        for path, module in self.named_modules():
            groups = getattr(module, "optimizer_groups", {})
            for name, parameter in module.named_parameters(recurse=False):
                group = groups.get(name, "matrix")
                group, factor = group if isinstance(group, tuple) else (group, 1.0)
                yield f"{path}.{name}".lstrip("."), parameter, group, factor

    def grouped_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by optimizer group."""
        groups: dict[str, list[nn.Parameter]] = {}
        for _, parameter, group, _ in self.rated_parameters():
            groups.setdefault(group, []).append(parameter)
        return groups


class Attention(nn.Module):
    """Self-attention whose values come from a `LayerValues`."""

    def __init__(self, config: TransformerConfig, values: "LayerValues"):
        super().__init__()
        self.head_dim = config.head_dim
        self.query = Linear(config.d_model, config.n_head * config.head_dim)
        self.key = Linear(config.d_model, config.n_kv_head * config.head_dim)
        self.value = values
        self.output = Linear(config.n_head * config.head_dim, config.d_model)

    def forward(
        self, inputs: "ValueInputs", rotary: tuple[Tensor, Tensor], mask: Mask,
        past: "LayerCache | None" = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Output (B, T, C) and this layer's value (B, T, K*D), None where decoding needs none."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_dim))

        q_BTHD = rms_norm(rotate(heads(self.query(inputs.x)), *rotary))
        if self.value.reads_keys:
            # The norm of a key is that of it rotated.
            plain_BTKD = rms_norm(heads(self.key(inputs.x)))
            inputs = inputs._replace(key=plain_BTKD.flatten(2))
            k_BTKD = rotate(plain_BTKD, *rotary)
        else:
            k_BTKD = rms_norm(rotate(heads(self.key(inputs.x)), *rotary))
        if past is None:
            value = self.value(inputs)
            v_BTKD = heads(value).to(q_BTHD.dtype)
            y_BHTD = attend(*(x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD)), mask)
        else:
            y_BHTD, value = past.attend(self.value, inputs, q_BTHD, k_BTKD, mask)
        return self.output(y_BHTD.transpose(1, 2).flatten(2)), value
