"""Transformer with Bank of Values (arXiv 2606.02780), made by bov-lightning 0.1.0. Apache-2.0."""


from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from functools import lru_cache
from pathlib import Path
from torch import Tensor
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from typing import Literal
from typing import Protocol
from typing import TYPE_CHECKING
from typing import TYPE_CHECKING, ClassVar, NamedTuple
from typing import TYPE_CHECKING, Union
import hashlib
import importlib
import math
import os
import torch
import torch.nn.functional as F
import transformers


# bov_lightning.errors: The one exception for mistakes that the user can put right.

class UserError(ValueError):
    """A mistake of the user's: one clear line that says what was wrong, where, and what to do.

    The ``bov`` command prints the line without a traceback and exits with code 2. It is a
    ``ValueError``, so that config dataclasses can raise it while they are being parsed.
    """


# bov_lightning.model.products: Matrix products for training, by the faster of the CPU's two libraries.

def _onednn_is_faster() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return False
    with info.open() as file:
        return "AuthenticAMD" in file.read(200)


ONEDNN_IS_FASTER = _onednn_is_faster()
"""Whether this processor is one of AMD's with AVX-512."""


def _is_fp32_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` (..., I) times the transpose of ``weight`` (O, I); nothing that autograd knows."""
    if not (ONEDNN_IS_FASTER and _is_fp32_on_cpu(x)):
        return F.linear(x, weight)
    if torch.compiler.is_compiling():
        return _multiply_when_compiled(x, weight)
    return _multiply_by_onednn(x, weight)


def _multiply_by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


# The compiler takes oneDNN's own operator for constant weights only. The file of an exported model
# holds this code too and needs an operator of its own.
@torch.library.custom_op(
    f"{__name__.replace('.', '_')}::multiply", mutates_args=(), tags=torch.Tag.flexible_layout
)
def _multiply_when_compiled(x: Tensor, weight: Tensor) -> Tensor:
    return _multiply_by_onednn(x, weight)


@_multiply_when_compiled.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As `torch.nn.functional.linear`, under autograd and autocast too."""
    if (
        ONEDNN_IS_FASTER
        and weight.requires_grad
        and torch.is_grad_enabled()
        and _is_fp32_on_cpu(x)
        and _is_fp32_on_cpu(weight)
        and not torch.is_autocast_enabled("cpu")
    ):
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        # Flat, as the backward pass needs it: the compiler would make a second one.
        flat = x.flatten(0, -2)
        ctx.save_for_backward(flat, weight)
        return multiply(flat, weight).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        x_grad = multiply(flat, weight.T) if ctx.needs_input_grad[0] else None
        if x_grad is not None:
            x_grad = x_grad.view(*grad.shape[:-1], weight.shape[1])
        # MKL is as fast as oneDNN where the sum runs over rows.
        return x_grad, flat.T @ x if ctx.needs_input_grad[1] else None


# bov_lightning.model.layers: The small parts that every room of the network uses.

def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without learned weight; eps is torch's for the dtype."""
    # On the meta device `bov plan` counts what a CPU needs.
    if x.requires_grad and x.device.type in ("cpu", "meta") and x.dtype == torch.float32:
        return _RMSNorm.apply(x)
    return F.rms_norm(x, (x.shape[-1],))


class _RMSNorm(torch.autograd.Function):
    """Half the time of torch's, which on a CPU is made of many passes over memory.

    It keeps its output, which the matrix that follows keeps anyway, unless autocast copies it.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(torch.finfo(x.dtype).eps).rsqrt_()
        # Squares beyond fp32 would train on as zeros: the guard must see them.
        scale.masked_fill_(scale == 0, torch.nan)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (grad * y).sum(dim=-1, keepdim=True).div_(-y.shape[-1])
        return torch.addcmul(grad, y, along).mul_(scale)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return _SquaredReLU.apply(x) if x.requires_grad else F.relu(x).square()


class _SquaredReLU(torch.autograd.Function):
    """Keeps one tensor for the backward pass and reads memory once; a third of autograd's time."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, positive, value=2)


class Initialiser:
    """Fills parameters, each from its own random stream, which is named after it.

    Numbers are drawn in fp32 on the CPU whatever the device, so that they are the same everywhere,
    and handed to ``write``, which may keep only a part of them.
    """

    def __init__(self, seed: int, write: Callable[[Tensor, Tensor], None] = Tensor.copy_):
        """``write(parameter, whole)`` stores a tensor of the parameter's shape."""
        self.seed, self.write = seed, write

    def stream(self, name: str) -> torch.Generator:
        """The random stream of that name."""
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def fill(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """Stores ``whole`` and returns it."""
        self.write(parameter, whole)
        return whole

    def constant(self, parameter: Tensor, value: float) -> Tensor:
        """The same number everywhere."""
        return self.fill(parameter, torch.full(parameter.shape, float(value), device="cpu"))

    def normal(self, name: str, parameter: Tensor, deviation: float) -> Tensor:
        """From a normal distribution around 0."""
        draw = torch.empty(parameter.shape, device="cpu")
        return self.fill(parameter, draw.normal_(0, deviation, generator=self.stream(name)))

    def uniform(self, name: str, parameter: Tensor, low: float, high: float) -> Tensor:
        """Uniformly from [low, high]."""
        draw = torch.empty(parameter.shape, device="cpu")
        return self.fill(parameter, draw.uniform_(low, high, generator=self.stream(name)))


class Linear(nn.Linear):
    """A linear layer without bias whose weight is filled by `Transformer.initialise` alone."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def reset_parameters(self) -> None:
        """Nothing: the default initialisation would be overwritten at once."""


# bov_lightning.model.config: The shape of the network, as typed dataclasses that refuse impossible combinations when built.

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
    """Where a value comes from: context (x W_V), first_layer (the first layer's value),
    initial_embedding (x0 W_V), bank (a learned table, looked up by token id), or the class path of
    a source of your own, such as low_rank_bank.LowRankBank."""

    layers: (
        Literal["every", "every_second", "second_half", "last_two_thirds", "last_third"] | list[int]
    ) = "last_third"
    """The target layers: a named set, or a list of layer indices that starts at 0."""

    coefficient: Literal["learned", "gate"] | float = 1.0
    """What the source is multiplied by: one learned scalar per layer, an input-dependent gate per
    key-value head, or a fixed number."""

    add_context: bool = False
    """Whether to add the source to x W_V instead of replacing it. A fixed number then multiplies
    both terms; learned gives a*V + b*source (a starts at 1, b at 0); gate gives V + gate*source."""

    shared: bool = False
    """Whether all target layers share one table (a bank, or a source of your own that can)."""

    def __post_init__(self):

        source = source_class(self.source)
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
        if self.add_context and source.is_context:
            raise UserError("value.add_context would add context to itself: set add_context: false")
        if isinstance(self.layers, list):
            if not self.layers:
                raise UserError("value.layers is an empty list: for no target layers use context")
            if len(set(self.layers)) < len(self.layers):
                raise UserError(f"value.layers names a layer twice: {self.layers}")
            if 0 in self.layers and source.skips_first_layer:
                raise UserError(
                    f"value.layers holds 0, but {self.source} reads the value that layer 0 computes"
                )


@dataclass(frozen=True)
class TransformerConfig:
    """The network's shape."""

    n_layer: int = 12
    """Number of layers."""

    n_head: int = 6
    """Query heads per layer; the head dimension is d_model / n_head."""

    n_kv_head: int = 6
    """Key and value heads per layer; divides n_head."""

    d_model: int = 768
    """Width of the residual stream."""

    vocab_size: int | None = None
    """Number of token ids. null: taken from the data's tokenizer."""

    sequence_len: int = 2048
    """Tokens per training row."""

    window_pattern: str = "SSSL"
    """Attention windows, tiled over the layers: L sees everything before it, S a quarter of
    sequence_len (rounded up to 128). The last layer is always L."""

    document_start: int | None = None
    """Token id that starts a document: attention and smear then never reach back across it. null:
    a row is one text, as in the paper."""

    value: ValueConfig = field(default_factory=ValueConfig)
    """Where value vectors come from."""

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_kv_head", "d_model", "sequence_len"):
            if getattr(self, name) < 1:
                raise UserError(f"model.config.{name} is {getattr(self, name)}: at least 1")
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
        if self.d_model < 24:
            raise UserError(f"model.config.d_model is {self.d_model}: the smear reads 24 channels")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(
                f"model.config.window_pattern {self.window_pattern!r}: use the letters S and L"
            )
        if self.vocab_size is not None and self.vocab_size < 2:
            raise UserError(f"model.config.vocab_size is {self.vocab_size}: at least 2")
        if isinstance(self.value.layers, list):
            outside = [layer for layer in self.value.layers if not 0 <= layer < self.n_layer]
            if outside:
                raise UserError(
                    f"value.layers holds {outside[0]}, but the model has layers 0 to "
                    f"{self.n_layer - 1}"
                )
        elif not self.target_layers:
            raise UserError(
                f"value.layers {self.value.layers} selects no layer of {self.n_layer} for source "
                f"{self.value.source}: add layers or choose another set"
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
    def target_layers(self) -> list[int]:
        """The layers whose values come from ``value.source``."""

        if isinstance(self.value.layers, list):
            return sorted(self.value.layers)
        first = 1 if source_class(self.value.source).skips_first_layer else 0
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


# bov_lightning.model.attention: Causal attention with rotary embeddings, grouped heads and sliding windows.

ROTARY_BASE = 100_000
QK_SCALE = 1.2
"""Normed queries and keys are both multiplied by this; `attention_scale` does it in one product."""


def attention_scale(head_dim: int) -> float:
    """What products of normed queries and keys are multiplied by."""
    return QK_SCALE**2 / head_dim**0.5


def rotary_angles(n_token: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each (T, D/2), fp32."""
    return rotary_angles_at(torch.arange(n_token, device=device), head_dim)


def rotary_angles_at(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles at ``positions`` (...), each (..., D/2), fp32."""
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / (ROTARY_BASE ** (channel / head_dim))
    angle = positions.float()[..., None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of the head dimension against each other; keeps the dtype.

    ``cos`` and ``sin`` are (T, D/2), or (B, T, D/2) where rows stand at different positions.
    """
    cos, sin = (
        torch.cat(halves, dim=-1).unsqueeze(-2).to(x_BTHD.dtype)
        for halves in ((cos, cos), (sin, -sin))
    )
    return _Rotation.apply(x_BTHD, cos, sin)


class _Rotation(torch.autograd.Function):
    """Its backward pass is the rotation back, in half the passes over memory of autograd's."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _Rotation.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _Rotation.rotate(grad, cos, -sin), None, None

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``sin`` carries the sign of each half."""
        x1, x2 = x.chunk(2, dim=-1)
        return torch.addcmul(x * cos, torch.cat((x2, x1), dim=-1), sin)


Mask = Union[Tensor, "BlockMask", int, None]
"""What `attend` takes: (T, T) or (B, 1, T, T) bool, True where a query (row) sees a key (column);
FlexAttention's form of it on CUDA; a window, in tokens; None for plain causal attention."""


@lru_cache(maxsize=8)
def _window_mask(n_token: int, window: int, device: torch.device) -> Tensor:
    # Validation runs in inference mode; a mask born there could not be used in training.
    with torch.inference_mode(False):
        position = torch.arange(n_token, device=device)
        distance = position[:, None] - position
        return (distance >= 0) & (distance <= window)


def _create_block_mask(*args, **kwargs) -> "BlockMask":
    # Imports the compiler, which commands that only count must not pay for.
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(*args, **kwargs)


@lru_cache(maxsize=8)
def _window_block_mask(n_token: int, window: int, device: torch.device) -> "BlockMask":
    def visible(batch, head, query, key):
        return (query >= key) & (query - key <= window)

    with torch.inference_mode(False):
        return _create_block_mask(visible, None, None, n_token, n_token, device=device)


def _document_block_mask(document_BT: Tensor, window: int) -> "BlockMask":
    def visible(batch, head, query, key):
        near = (query >= key) & (query - key <= window)
        return near & (document_BT[batch, query] == document_BT[batch, key])

    n_row, n_token = document_BT.shape
    return _create_block_mask(visible, n_row, None, n_token, n_token, device=document_BT.device)


def make_masks(
    windows: list[int | None], token_ids_BT: Tensor, document_start: int | None
) -> dict[int | None, Mask]:
    """The mask of each window: a token sees itself and ``window`` tokens to its left.

    With ``document_start``, it sees none from before the last such token.
    """
    n_token, device = token_ids_BT.shape[1], token_ids_BT.device
    flex = device.type == "cuda"
    masks: dict[int | None, Mask] = {}
    for window in set(windows):
        reach = n_token - 1 if window is None else min(window, n_token - 1)
        if document_start is not None:
            document_BT = (token_ids_BT == document_start).cumsum(1)
            if flex:
                masks[window] = _document_block_mask(document_BT, reach)
            else:
                same_BTT = document_BT[:, :, None] == document_BT[:, None]
                masks[window] = (same_BTT & _window_mask(n_token, reach, device))[:, None]
        elif reach == n_token - 1:
            masks[window] = None
        else:
            masks[window] = _window_block_mask(n_token, reach, device) if flex else reach
    return masks


@lru_cache(maxsize=1)
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Mask) -> Tensor:
    """Causal attention of normed queries and keys, (B, H, T, D); one query alone sees all keys.

    The one place that chooses the implementation: torch's scaled dot product attention, except for
    masks on CUDA, where FlexAttention skips what they hide (it cannot train on a CPU).
    """
    how = {
        "scale": attention_scale(q_BHTD.shape[3]),
        "enable_gqa": q_BHTD.shape[1] != k_BKTD.shape[1],
    }
    if isinstance(mask, int):
        return _attend_in_window(q_BHTD, k_BKTD, v_BKTD, mask, how)
    if not isinstance(mask, Tensor | None):
        return _compiled_flex_attention()(q_BHTD, k_BKTD, v_BKTD, block_mask=mask, **how)
    return F.scaled_dot_product_attention(
        q_BHTD, k_BKTD, v_BKTD,
        attn_mask=mask, is_causal=mask is None and q_BHTD.shape[2] > 1, **how,
    )  # fmt: skip


@lru_cache(maxsize=32)
def _band_mask(n_query: int, n_key: int, window: int, device: torch.device) -> Tensor:
    """(n_query, n_key) bool: what the last queries of a text see of its last keys."""
    with torch.inference_mode(False):
        query = torch.arange(n_key - n_query, n_key, device=device)
        distance = query[:, None] - torch.arange(n_key, device=device)
        return (distance >= 0) & (distance <= window)


SMALLEST_BLOCK = 64
"""Queries; smaller blocks cost more time than the hidden keys that they leave out."""


def _attend_in_window(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, window: int, how: dict
) -> Tensor:
    """Each token sees itself and ``window`` tokens to its left; time grows as T, not as T^2.

    Queries go in blocks of half a window; a block sees its own keys and those of the blocks before
    that the window reaches.
    """
    size = max(window // 2, SMALLEST_BLOCK)
    n_before = math.ceil(window / size)
    q_blocks, k_blocks, v_blocks = (
        x.transpose(1, 2).split(size, dim=1) for x in (q_BHTD, k_BKTD, v_BKTD)
    )
    outputs = []
    for i, q_BTHD in enumerate(q_blocks):
        seen = slice(max(0, i - n_before), i + 1)
        # Copies, since the gradients of overlapping slices would each be as long as the text.
        k_BTKD, v_BTKD = (
            torch.cat(blocks[seen], dim=1) if i else blocks[0] for blocks in (k_blocks, v_blocks)
        )
        n_query, n_key = q_BTHD.shape[1], k_BTKD.shape[1]
        hides = i or n_key > window + 1
        mask = _band_mask(n_query, n_key, window, q_BHTD.device) if hides else None
        y_BHTD = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD)),
            attn_mask=mask, is_causal=mask is None, **how,
        )  # fmt: skip
        outputs.append(y_BHTD.transpose(1, 2))
    return torch.cat(outputs, dim=1).transpose(1, 2)


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
        k_BTKD = rms_norm(rotate(heads(self.key(inputs.x)), *rotary))
        if past is None:
            value = self.value(inputs)
            v_BTKD = heads(value).to(q_BTHD.dtype)
            y_BHTD = attend(*(x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD)), mask)
        else:
            q_BHTD, k_BKSD = q_BTHD.transpose(1, 2), past.keys.extend(k_BTKD)
            y_BHTD, value = self.value.attend_past(inputs, q_BHTD, k_BKSD, mask, past)
        return self.output(y_BHTD.transpose(1, 2).flatten(2)), value


# bov_lightning.model.kernels: One Triton kernel: q.K^T, softmax and the value rows of a bank in one pass over the past.

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


BLOCK_S = 64
"""Past tokens that a program reads at a time."""

PROGRAMS = 1024
"""About how many programs a call starts: several per multiprocessor of a large GPU."""

if triton is not None:

    @triton.jit
    def attend_split(
        q, k, token_ids, table, mask, out, peak, total,
        k_row, k_head, k_token, ids_row, table_row, mask_row,
        n_past, per_split, scale,
        HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        """One head's attention to one part of the past: unscaled output, its maximum and sum."""
        bag, split = tl.program_id(0), tl.program_id(1)
        row, head = bag // HEADS, bag % HEADS
        kv_head = head // GROUP
        d = tl.arange(0, BLOCK_D)
        query = tl.load(q + bag * DIM + d, mask=d < DIM, other=0.0).to(tl.float32) * scale
        highest = -float("inf")
        weight_sum = 0.0
        value_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
        first = split * per_split
        last = tl.minimum(first + per_split, n_past)
        for start in range(first, last, BLOCK):
            s = start + tl.arange(0, BLOCK)
            seen = s < last
            if MASKED:
                seen = seen & (tl.load(mask + row * mask_row + s, mask=seen, other=0) != 0)
            read = seen[:, None] & (d < DIM)[None, :]
            at = row.to(tl.int64) * k_row + kv_head * k_head + s[:, None] * k_token + d[None, :]
            keys = tl.load(k + at, mask=read, other=0.0).to(tl.float32)
            score = tl.where(seen, tl.sum(keys * query[None, :], 1), -float("inf"))
            new_highest = tl.maximum(highest, tl.max(score, 0))
            # A part that sees nothing keeps -inf, whose difference from itself would be NaN.
            shift = tl.where(new_highest == -float("inf"), 0.0, new_highest)
            weight = tl.exp(score - shift)
            decay = tl.exp(highest - shift)
            ids = tl.load(token_ids + row * ids_row + s, mask=seen, other=0)
            rows = ids[:, None].to(tl.int64) * table_row + kv_head * DIM + d[None, :]
            values = tl.load(table + rows, mask=read, other=0.0).to(tl.float32)
            value_sum = value_sum * decay + tl.sum(weight[:, None] * values, 0)
            weight_sum = weight_sum * decay + tl.sum(weight, 0)
            highest = new_highest
        part = bag * tl.num_programs(1) + split
        tl.store(out + part * DIM + d, value_sum, mask=d < DIM)
        tl.store(peak + part, highest)
        tl.store(total + part, weight_sum)


def attend_fused(
    q_BHTD: Tensor, k_BKSD: Tensor, token_ids_BS: Tensor, table: Tensor, mask: Mask
) -> Tensor:
    """`attend_bank` of one new token per row, in one kernel; its arguments and result."""
    n_row, n_head, _, head_dim = q_BHTD.shape
    n_kv_head, n_past = k_BKSD.shape[1:3]
    n_bag = n_row * n_head
    n_split = max(1, min(-(-PROGRAMS // n_bag), -(-n_past // BLOCK_S)))
    per_split = -(-n_past // (n_split * BLOCK_S)) * BLOCK_S
    n_split = -(-n_past // per_split)
    out = q_BHTD.new_empty(n_bag, n_split, head_dim, dtype=torch.float32)
    peak, total = q_BHTD.new_empty(2, n_bag, n_split, dtype=torch.float32).unbind()
    seen_BS = None
    if mask is not None:
        seen_BS = mask[:, 0, 0].expand(n_row, -1).to(torch.int8).contiguous()
    k_BKSD = k_BKSD if k_BKSD.stride(3) == 1 else k_BKSD.contiguous()
    ids = token_ids_BS.expand(n_row, -1).contiguous()
    attend_split[(n_bag, n_split)](
        q_BHTD.contiguous(), k_BKSD, ids, table, ids if seen_BS is None else seen_BS,
        out, peak, total,
        k_BKSD.stride(0), k_BKSD.stride(1), k_BKSD.stride(2), n_past, table.stride(0), n_past,
        n_past, per_split, attention_scale(head_dim),
        HEADS=n_head, GROUP=n_head // n_kv_head, DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), BLOCK=BLOCK_S, MASKED=seen_BS is not None,
    )  # fmt: skip
    share = (peak - peak.amax(1, keepdim=True)).exp()
    y = (out * share[:, :, None]).sum(1) / (total * share).sum(1)[:, None]
    return y.view(n_row, n_head, 1, head_dim).to(q_BHTD.dtype)


# bov_lightning.model.decode: Attention of one new token to a long past: read keys once, and as few values as possible.

KEYS_PER_CHUNK = 512
"""Keys that are converted to fp32 at a time on a CPU: what its cache holds for some 12 heads."""


def probabilities(q_BHTD: Tensor, k_BKSD: Tensor, mask_BTS: Tensor | None) -> Tensor:
    """Softmax over the past of one query per head, (B, H, S) fp32."""
    n_row, n_head, _, head_dim = q_BHTD.shape
    q_BKGD = q_BHTD.reshape(n_row, k_BKSD.shape[1], -1, head_dim)
    # Keys first: for a single query per head this product runs at the memory's speed, the
    # transposed one at a quarter of it.
    if k_BKSD.dtype == torch.float32 or q_BHTD.is_cuda:
        score_BKSG = (k_BKSD @ q_BKGD.to(k_BKSD.dtype).mT).float()
    else:
        score_BKSG = _half_scores(q_BKGD, k_BKSD)
    score_BHS = score_BKSG.mT.reshape(n_row, n_head, -1) * attention_scale(head_dim)
    if mask_BTS is not None:
        score_BHS = score_BHS.masked_fill(~mask_BTS, -torch.inf)
    return score_BHS.softmax(-1)


def _half_scores(q_BKGD: Tensor, k_BKSD: Tensor) -> Tensor:
    """Products in fp32 of half-precision queries and keys, (B, K, S, G)."""
    n_row, n_kv_head, n_key, head_dim = k_BKSD.shape
    q_BKDG = q_BKGD.float().mT
    score = q_BKDG.new_empty(n_row, n_kv_head, n_key, q_BKDG.shape[3])
    scratch = q_BKDG.new_empty(n_row, n_kv_head, min(KEYS_PER_CHUNK, n_key), head_dim)
    for first in range(0, n_key, KEYS_PER_CHUNK):
        keys = k_BKSD[:, :, first : first + KEYS_PER_CHUNK]
        chunk = scratch[:, :, : keys.shape[2]].copy_(keys)
        score[:, :, first : first + KEYS_PER_CHUNK] = chunk @ q_BKDG
    return score


def weighted_rows(weight_BHS: Tensor, row_BHS: Tensor, table_ND: Tensor) -> Tensor:
    """(B, H, 1, D): per head the sum of the table's rows times their weights; no row is copied."""
    bags = F.embedding_bag(
        row_BHS.flatten(0, 1),
        table_ND,
        per_sample_weights=weight_BHS.flatten(0, 1).to(table_ND.dtype),
        mode="sum",
    )
    return bags.unflatten(0, weight_BHS.shape[:2])[:, :, None]


def attend_values(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask) -> Tensor:
    """`attend` to kept values, faster for one new token per row on a CPU."""
    dense = v_BKSD.stride(0) == v_BKSD.stride(1) * v_BKSD.shape[1] and v_BKSD[0, 0].is_contiguous()
    if q_BHTD.shape[2] > 1 or q_BHTD.is_cuda or not dense:
        return attend(q_BHTD, k_BKSD.to(q_BHTD.dtype), v_BKSD.to(q_BHTD.dtype), mask)
    n_row, n_kv_head, n_past, head_dim = v_BKSD.shape
    n_room = v_BKSD.stride(1) // head_dim
    n_table = (n_row * n_kv_head - 1) * n_room + n_past
    table_ND = v_BKSD.as_strided((n_table, head_dim), (head_dim, 1))
    head = torch.arange(n_row * n_kv_head).view(n_row, n_kv_head, 1)
    row_BKS = head * n_room + torch.arange(n_past)
    row_BHS = row_BKS.repeat_interleave(q_BHTD.shape[1] // n_kv_head, dim=1)
    weight_BHS = probabilities(q_BHTD, k_BKSD, None if mask is None else mask[:, 0])
    return weighted_rows(weight_BHS, row_BHS, table_ND).to(q_BHTD.dtype)


def attend_gathered(
    q_BHTD: Tensor, k_BKSD: Tensor, token_ids_BS: Tensor, table: Tensor, mask: Mask
) -> Tensor:
    """The reference, and the way of several new tokens: copies the value of every past token."""
    rows = F.embedding(token_ids_BS, table).unflatten(-1, (k_BKSD.shape[1], -1))
    v_BKSD = rows.transpose(1, 2).to(q_BHTD.dtype)
    return attend(q_BHTD, k_BKSD.to(q_BHTD.dtype), v_BKSD, mask)


def attend_bag(
    q_BHTD: Tensor, k_BKSD: Tensor, token_ids_BS: Tensor, table: Tensor, mask: Mask
) -> Tensor:
    """One new token per row: an embedding bag over the past tokens."""
    n_kv_head, group = k_BKSD.shape[1], q_BHTD.shape[1] // k_BKSD.shape[1]
    weight_BHS = probabilities(q_BHTD, k_BKSD, None if mask is None else mask[:, 0])
    head = torch.arange(n_kv_head, device=table.device).repeat_interleave(group)
    row_BHS = token_ids_BS[:, None] * n_kv_head + head[:, None]
    table_ND = table.view(-1, q_BHTD.shape[3])
    return weighted_rows(weight_BHS, row_BHS, table_ND).to(q_BHTD.dtype)


def attend_summed(
    q_BHTD: Tensor, k_BKSD: Tensor, token_ids_BS: Tensor, table: Tensor, mask: Mask
) -> Tensor:
    """One new token per row: sums the weights of equal tokens, then bags the distinct ones."""
    n_head, head_dim, n_kv_head = q_BHTD.shape[1], q_BHTD.shape[3], k_BKSD.shape[1]
    weight_BHS = probabilities(q_BHTD, k_BKSD, None if mask is None else mask[:, 0])
    head = torch.arange(n_kv_head, device=table.device).repeat_interleave(n_head // n_kv_head)
    table_ND = table.view(-1, head_dim)
    rows = []
    for weight_HS, ids_S in zip(weight_BHS, token_ids_BS, strict=True):
        seen_N = torch.zeros(len(table), dtype=torch.bool, device=table.device)
        distinct = seen_N.index_fill_(0, ids_S, True).nonzero()[:, 0]
        summed_HN = weight_HS.new_zeros(n_head, len(table))
        summed_HN.scatter_add_(1, ids_S.expand(n_head, -1), weight_HS)
        row_HN = distinct * n_kv_head + head[:, None]
        rows.append(weighted_rows(summed_HN[None, :, distinct], row_HN[None], table_ND))
    return torch.cat(rows).to(q_BHTD.dtype)


def best_way(n_token: int, n_past: int, n_vocab: int, on_cuda: bool = False) -> Callable:
    """Which of these reads a bank: by the number of new tokens and by the length of the past.

    From about |V| tokens on, so many are equal that summing their weights first saves more reads
    than it costs. On CUDA one kernel does it all, where Triton is installed.
    """
    if n_token > 1:
        return attend_gathered
    if on_cuda:

        if triton is not None:
            return attend_fused
    return attend_summed if n_past > n_vocab else attend_bag


def attend_bank(
    q_BHTD: Tensor, k_BKSD: Tensor, token_ids_BS: Tensor, table: Tensor, mask: Mask
) -> Tensor:
    """Attention (B, H, T, D) to a past whose values are rows of ``table`` (N, K*D)."""
    way = best_way(q_BHTD.shape[2], k_BKSD.shape[2], len(table), q_BHTD.is_cuda)
    return way(q_BHTD, k_BKSD, token_ids_BS, table, mask)


# bov_lightning.model.values: Value sources: where the value vectors of an attention layer come from.

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

    Recipes name the ones below by ``name``, a class of somebody's own by its class path.
    """

    name: ClassVar[str]
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
    value_cache: ClassVar[bool] = True
    """Whether decoding must keep the layer's own values. False: `reserve` and `attend_past` say
    what it keeps instead."""
    optimizer_groups: ClassVar[dict[str, str]] = {}
    """Optimizer group by parameter name; a parameter that is not named is a Muon matrix."""

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


class ContextValue(ValueSource):
    """Standard attention: V = x W_V."""

    name = "context"
    n_projection = 1
    is_context = True

    def forward(self, inputs, projection):
        return projection(inputs.x)


class FirstLayerValue(ValueSource):
    """The value that the first layer computed."""

    name = "first_layer"
    skips_first_layer = True
    value_cache = False

    def forward(self, inputs, projection):
        return inputs.first_value

    def reserve(self, past):
        past.keep_first_values()

    def attend_past(self, inputs, q_BHTD, k_BKSD, mask, past):
        v_BTKD = inputs.first_value.unflatten(-1, (k_BKSD.shape[1], -1))
        return attend_values(q_BHTD, k_BKSD, past.values.extend(v_BTKD), mask)


class InitialEmbeddingValue(ValueSource):
    """The layer's own W_V applied to the initial token embedding, normed once more."""

    name = "initial_embedding"
    n_projection = 1

    def forward(self, inputs, projection):
        return projection(rms_norm(inputs.x0))


class BankOfValues(ValueSource):
    """A learned table of value vectors, one row per token id (arXiv 2606.02780).

    Initialised to ``W_V RMSNorm(embedding)``, with W_V drawn as the layer's value matrix would be
    and then dropped: at step 0 the layer attends exactly as with values from the embedding.
    """

    name = "bank"
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


TRUSTED = "BOV_TRUSTED_MODULES"
"""Variable that names the modules, separated by commas, that a checkpoint's class may come from."""


def class_path(cls: type) -> str:
    """``module.Class``, as recipes name a source of somebody's own."""
    return f"{cls.__module__}.{cls.__qualname__}"


def import_module_of(path: str) -> None:
    """Imports the module of a class path, or raises a `UserError` where there is none."""
    module, _, _ = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")):
        raise UserError(f"value.source {path!r} is no class path such as my_module.MySource")
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"value.source {path} cannot be imported, since there is no module {error.name}: "
            "install it, or put its folder on PYTHONPATH"
        ) from None


def _subclasses(cls: type) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def source_class(name: str) -> type[ValueSource]:
    """The value source of that name, or of that class path.

    A stranger's checkpoint is read by this too, so a class path is looked up among the classes that
    are imported anyway; only a module that BOV_TRUSTED_MODULES names is imported for it. Those of
    the user's own recipes are, before, by `bov_lightning.recipe.import_source`.

    Raises:
        UserError: an unknown name, with the known ones, or a class that is not imported.
    """
    module, _, _ = name.rpartition(".")
    if module and module in os.environ.get(TRUSTED, "").split(","):
        import_module_of(name)
    known = list(_subclasses(ValueSource))
    built_in = {cls.name: cls for cls in known if cls.__module__ == __name__}
    # The last one of a path: a notebook may have run its cell again.
    sources = {class_path(cls): cls for cls in known} | built_in
    if name in sources:
        return sources[name]
    if module:
        raise UserError(
            f"value.source {name} is not imported: a recipe of yours that names it imports it, a "
            f"checkpoint does not; if you trust that module, set {TRUSTED}={module}"
        )
    raise UserError(
        f"value.source {name!r} is unknown: use one of {', '.join(built_in)}, or the class path of "
        "a source of your own"
    )


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
        scale = self.constant if self.coefficient is None else self.coefficient
        y_BHTD = self._source.attend_past(inputs, q_BHTD, k_BKSD, mask, past)
        return scale * y_BHTD, None

    def forward(self, inputs: ValueInputs) -> Tensor:
        """(B, T, V)."""
        value = self._source(inputs, self.projection)
        if self.gate is not None:
            gate = 3 * torch.sigmoid(self.gate(inputs.x[..., :GATE_CHANNELS]))
            per_head = value.unflatten(-1, (gate.shape[-1], -1))
            return self.projection(inputs.x) + (gate.unsqueeze(-1) * per_head).flatten(-2)
        scale = self.constant if self.coefficient is None else self.coefficient
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


# bov_lightning.model.loss: Soft-capped cross-entropy that never holds the logits of all tokens at once.

SOFTCAP = 15.0
IGNORED = -1
LOGITS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**26}
"""Elements of the fp32 logits that exist at once: what a CPU's cache holds, 256 MiB on a GPU."""


def softcap(logits: Tensor) -> Tensor:
    """Bounds logits smoothly to ±15."""
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def softcapped_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean"
) -> Tensor:
    """Negative log-likelihood in nats of ``targets`` under soft-capped logits ``x @ weight.T``.

    Args:
        x: (..., C), the normed output of the last block.
        weight: (V, C).
        targets: (...), int64; -1 is not counted.
        reduction: ``mean`` over the counted targets (a scalar), or ``none``: the shape of
            ``targets``, 0 where not counted, without gradient.
    """
    # Autocast does not reach into an autograd.Function: choose the matmul dtype here.
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    flat_x, flat_targets = x.flatten(0, -2), targets.flatten()
    if reduction == "mean":
        return _MeanCrossEntropy.apply(flat_x, weight, flat_targets)
    if reduction == "none":
        return _token_losses(flat_x, weight, flat_targets).view(targets.shape)
    raise ValueError(f"reduction {reduction!r}: use mean or none")


def _chunks(x_NC: Tensor, weight_VC: Tensor) -> list[slice]:
    n_logit = LOGITS_PER_CHUNK["cpu" if x_NC.device.type == "cpu" else "cuda"]
    size = max(1, n_logit // len(weight_VC))
    return [slice(start, start + size) for start in range(0, len(x_NC), size)]


@torch.no_grad()
def _token_losses(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    weight = weight_VC.to(x_NC.dtype)
    losses = [
        F.cross_entropy(
            softcap(F.linear(x_NC[rows], weight).float()),
            targets_N[rows],
            ignore_index=IGNORED,
            reduction="none",
        )
        for rows in _chunks(x_NC, weight)
    ]
    return torch.cat(losses)


class _MeanCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits are at hand.

    So nothing of the size of the logits is kept, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
        weight = weight_VC.to(x_NC.dtype)
        counted = (targets_N != IGNORED).sum().clamp(min=1)
        total = torch.zeros((), dtype=torch.float32, device=x_NC.device)
        x_grad = torch.empty_like(x_NC) if ctx.needs_input_grad[0] else None
        weight_grad = (
            torch.zeros_like(weight_VC, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        for rows in _chunks(x_NC, weight):
            x, target = x_NC[rows], targets_N[rows]
            index, seen = target.clamp(min=0)[:, None], (target != IGNORED)[:, None]
            # tanh(z) = 2 sigmoid(2 z) - 1, which is several times as fast on a CPU.
            twice = multiply(x, weight).float().mul_(2 / SOFTCAP)
            capped = twice.sigmoid_().mul_(2).sub_(1)
            # No maximum to subtract: soft-capped logits cannot overflow exp.
            probability = (SOFTCAP / math.log(2) * capped).exp2_()
            normaliser = probability.sum(dim=-1, keepdim=True)
            nats = normaliser.log() - SOFTCAP * capped.gather(1, index)
            total += (nats * seen).sum()
            if x_grad is None and weight_grad is None:
                continue
            # d loss / d logit = (softmax - onehot) * (1 - tanh^2), averaged over the targets.
            share = seen / counted
            probability.mul_(share / normaliser).scatter_add_(1, index, -share)
            grad = torch.addcmul(probability, probability, capped.square_(), value=-1).to(x.dtype)
            if x_grad is not None:
                x_grad[rows] = multiply(grad, weight.T)
            if weight_grad is not None:
                if x.dtype == weight_grad.dtype:
                    weight_grad.addmm_(grad.T, x)
                else:
                    weight_grad += grad.T @ x
        ctx.gradients = x_grad, weight_grad
        ctx.weight_dtype = weight_VC.dtype
        return total / counted

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        # Scaled where they lie: the weight's is the largest tensor of a small model's step.
        (x_grad, weight_grad), ctx.gradients = ctx.gradients, (None, None)
        if x_grad is None and weight_grad is None:
            raise RuntimeError("the loss was differentiated before: compute it again")
        return (
            None if x_grad is None else x_grad.mul_(grad_output.to(x_grad.dtype)),
            None if weight_grad is None else weight_grad.mul_(grad_output).to(ctx.weight_dtype),
            None,
        )


# bov_lightning.model.offload: Value tables that stay out of the device's memory: only the rows of a batch's ids come to it.

MIN_SLOTS = 256
"""Room for rows is doubled from here on."""

_threads = ThreadPoolExecutor(1, thread_name_prefix="value-rows")


class HostTable(Protocol):
    """A table outside of the device's memory."""

    n_row: int
    width: int
    nbytes: int

    def take(self, ids_N: Tensor) -> Tensor:
        """Those rows, (N, width), in the host's memory."""


class MemoryTable:
    """A table in the host's memory; pinned where a CUDA device will copy from it."""

    def __init__(self, table: Tensor, device: torch.device):
        self.pinned = device.type == "cuda"
        self.table = table.pin_memory() if self.pinned else table
        (self.n_row, self.width), self.nbytes = table.shape, table.nbytes

    def take(self, ids_N: Tensor) -> Tensor:
        """Those rows; in pinned memory if the table is."""
        rows = torch.empty(len(ids_N), self.width, dtype=self.table.dtype, pin_memory=self.pinned)
        return torch.index_select(self.table, 0, ids_N, out=rows)


class FileTable:
    """A table inside of a file, whose rows are read when they are asked for."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, int], dtype: torch.dtype):
        """``offset`` in bytes from the start of the file."""
        self._file = os.open(path, os.O_RDONLY)
        self._offset, self._dtype = offset, dtype
        self.n_row, self.width = shape
        self._row_bytes = self.width * dtype.itemsize
        self.nbytes = self.n_row * self._row_bytes

    def take(self, ids_N: Tensor) -> Tensor:
        """Those rows, through the system's page cache."""
        rows = torch.empty(len(ids_N), self.width, dtype=self._dtype)
        buffers = rows.view(torch.uint8).numpy()
        for buffer, row in zip(buffers, ids_N.tolist(), strict=True):
            at = self._offset + row * self._row_bytes
            if os.preadv(self._file, [buffer], at) != self._row_bytes:
                raise OSError(f"the file of a value table ends before its row {row}")
        return rows

    def __del__(self):
        os.close(self._file)


class Slots:
    """Which ids a cache has seen, and the slot of each; shared by its banks."""

    def __init__(self, n_vocab: int, device: torch.device):
        self.slot_of_id = torch.full((n_vocab,), -1)
        self.device = device
        self.on_device = self.slot_of_id.to(device, copy=True)
        self.n_used = 0

    def admit(self, token_ids_BT: Tensor) -> Tensor:
        """Gives new ids a slot each; returns these ids, in the order of their slots, on the CPU."""
        ids = token_ids_BT.cpu().unique()
        new = ids[self.slot_of_id[ids] < 0]
        slots = torch.arange(self.n_used, self.n_used + len(new))
        self.slot_of_id[new] = slots
        self.on_device[new.to(self.device)] = slots.to(self.device)
        self.n_used += len(new)
        return new

    def copy(self) -> "Slots":
        """An independent copy."""
        other = Slots(0, self.device)
        other.slot_of_id, other.on_device = self.slot_of_id.clone(), self.on_device.clone()
        other.n_used = self.n_used
        return other


class BankRows:
    """The rows of one table by slot, on the cache's device."""

    def __init__(self, table: HostTable, dtype: torch.dtype, device: torch.device):
        self.table, self.dtype, self.device = table, dtype, device
        self._rows = torch.empty(0, table.width, dtype=dtype, device=device)
        self._n_used = 0
        self._pending: Future | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def prefetch(self, ids_N: Tensor) -> None:
        """Starts to fetch the rows of ids that were just admitted."""
        self.wait()
        if len(ids_N):
            self._pending = _threads.submit(self._fetch, ids_N)

    @torch.no_grad()
    def _fetch(self, ids_N: Tensor) -> Tensor:
        """Appends rows; the host's copy must live until the device has it."""
        rows, end = self.table.take(ids_N), self._n_used + len(ids_N)
        with torch.cuda.stream(self._stream):
            if end > len(self._rows):
                room = max(MIN_SLOTS, 2 * len(self._rows), end)
                grown = torch.empty(room, self.table.width, dtype=self.dtype, device=self.device)
                grown[: self._n_used] = self._rows[: self._n_used]
                self._rows = grown
            self._rows[self._n_used : end] = rows.to(self.device, self.dtype, non_blocking=True)
        self._n_used = end
        return rows

    def wait(self) -> Tensor:
        """All rows that were asked for, (slots, width)."""
        if self._pending is not None:
            # Kept until the next call: the device may still be copying from it.
            self._sent, self._pending = self._pending.result(), None
            if self._stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(self._stream)
                self._rows.record_stream(torch.cuda.current_stream(self.device))
        return self._rows[: self._n_used]

    def copy(self) -> "BankRows":
        """An independent copy."""
        other = BankRows(self.table, self.dtype, self.device)
        other._rows = self.wait().clone()
        other._n_used = self._n_used
        return other

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        self.wait()
        return self._rows.nbytes


# bov_lightning.model.cache: What decoding keeps of the past: keys, values where they have context, token ids.

PREFILL_CHUNK = 512
"""New tokens that a row feeds at a time in `prefill`."""


class Step:
    """One call's new tokens: how many each row gets, and where they stand."""

    def __init__(self, before: list[int], n_token: int, lengths: list[int], device: torch.device):
        self.n_token, self.device = n_token, device
        self.before, self.lengths = before, lengths
        self.after = [old + new for old, new in zip(before, lengths, strict=True)]
        self.uniform = len(set(before)) == 1 and set(lengths) == {n_token}
        rows = before[:1] if self.uniform else before
        self.before_B1 = torch.tensor(rows, device=device)[:, None]
        self.positions_BT = self.before_B1 + torch.arange(n_token, device=device)
        """(1, T) where all rows stand at the same place."""

    @cached_property
    def length_column(self) -> Tensor:
        """(B, 1): new tokens of each row."""
        return torch.tensor(self.lengths, device=self.device)[:, None]


class Span:
    """Where the past that a window sees lies, and how a step's new tokens join it."""

    def __init__(self, window: int | None, max_context: int):
        self.reach = max_context if window is None else window
        self.capacity = min(self.reach + 1, max_context)

    def begin(self, step: Step, token_ids: Tensor | None, document_start: int | None) -> None:
        """Lays out one step: what will be read and in which order."""
        self.step, self._token_ids, self._document_start = step, token_ids, document_start
        start, end = max(step.before), max(step.after)
        self.wraps = end > self.capacity
        # A ring forgets old keys that the first of several new tokens still see: these attend to
        # the old ones and the new ones side by side.
        self.joins = step.n_token > 1 and (start == 0 or self.wraps)
        self.n_read = min(start if self.joins else end, self.capacity)
        for name in ("key_positions", "mask", "token_ids"):
            self.__dict__.pop(name, None)

    @cached_property
    def key_positions(self) -> Tensor:
        """(1 or B, S): where in the text the keys stand; negative: a slot that holds nothing."""
        slots_BS = self._positions_of_slots()
        if not self.joins:
            return slots_BS
        n_row = max(len(slots_BS), len(self.step.positions_BT))
        both = (slots_BS.expand(n_row, -1), self.step.positions_BT.expand(n_row, -1))
        return torch.cat(both, dim=1)

    def _positions_of_slots(self) -> Tensor:
        """(1 or B, n_read): what the slots that are read hold; negative: nothing yet."""
        slot = torch.arange(self.n_read, device=self.step.device)[None]
        if not self.wraps:
            return slot
        known = self.step.before if self.joins else self.step.after
        last = torch.tensor(known[:1] if self.step.uniform else known, device=slot.device) - 1
        return last[:, None] - (last[:, None] - slot) % self.capacity

    @cached_property
    def mask(self) -> Tensor | None:
        """(1 or B, 1, T, S) bool; None: one new token that sees all keys, or plain causal."""
        step, start = self.step, self._document_start
        sees_all = step.n_token == 1 and step.uniform
        causal = self.joins and self.n_read == 0 and step.n_token <= self.reach + 1
        if (sees_all or causal) and start is None:
            return None
        key_BTS = self.key_positions[:, None]
        distance = step.positions_BT[:, :, None] - key_BTS
        mask = (key_BTS >= 0) & (distance >= 0) & (distance <= self.reach)
        if start is not None:
            document = (self._token_ids == start).cumsum(1)
            query = self._take(document, step.positions_BT)[:, :, None]
            mask = mask & (query == self._take(document, self.key_positions)[:, None])
        return mask[:, None]

    @staticmethod
    def _take(kept: Tensor, positions: Tensor) -> Tensor:
        """``kept`` (B, max_context) at those positions of every row."""
        positions = positions.clamp(0, kept.shape[1] - 1).expand(len(kept), -1)
        return kept.gather(1, positions)

    @cached_property
    def token_ids(self) -> Tensor:
        """(B, S): token ids in the order of the keys."""
        if not (self.wraps or self.joins):
            return self._token_ids[:, : self.n_read]
        return self._take(self._token_ids, self.key_positions)

    def write(self, kept_BKSD: Tensor, x_BTKD: Tensor) -> None:
        """Puts what the step brings into its slots."""
        step, capacity = self.step, self.capacity
        if not step.uniform:
            token, length = torch.arange(step.n_token), torch.tensor(step.lengths)[:, None]
            due = (token < length) & (token >= length - capacity)
            rows, tokens = due.nonzero().to(step.device).unbind(1)
            slots = (step.before_B1[rows, 0] + tokens) % capacity
            kept_BKSD[rows, :, slots] = x_BTKD[rows, tokens].to(kept_BKSD.dtype)
            return
        x_BKTD = x_BTKD.transpose(1, 2)
        n_kept = min(step.n_token, capacity)
        first = (step.after[0] - n_kept) % capacity
        if first + n_kept <= capacity:
            kept_BKSD[:, :, first : first + n_kept] = x_BKTD[:, :, -n_kept:]
        else:
            slots = (first + torch.arange(n_kept, device=step.device)) % capacity
            kept_BKSD.index_copy_(2, slots, x_BKTD[:, :, -n_kept:].to(kept_BKSD.dtype))

    def read(self, kept_BKSD: Tensor) -> Tensor:
        """What the slots hold."""
        return kept_BKSD[:, :, : self.n_read]


class Store:
    """Keys or values of one span, (B, K, capacity, D)."""

    def __init__(self, span: Span, kept_BKSD: Tensor):
        self.span, self.kept = span, kept_BKSD
        self._step: Step | None = None

    def extend(self, x_BTKD: Tensor) -> Tensor:
        """Takes the new tokens' share and gives what they attend to, (B, K, S, D).

        Layers that share a store all call this; the first one's call counts.
        """
        if self._step is not self.span.step:
            self._step = self.span.step
            x_BTKD = x_BTKD.detach()
            if self.span.joins:
                new = x_BTKD.transpose(1, 2).to(self.kept.dtype)
                old = self.span.read(self.kept)
                self._joined = torch.cat((old, new), dim=2) if old.shape[2] else new
            self.span.write(self.kept, x_BTKD)
        return self._joined if self.span.joins else self.span.read(self.kept)

    def release(self) -> None:
        """Forgets what only one step needs."""
        self._joined = None


class LayerCache:
    """One layer's past."""

    def __init__(self, cache: "Cache", window: int | None):
        self.cache, self.span = cache, cache.span(window)
        self.keys = cache.new_store(self.span)
        self.values: Store | None = None

    def keep_values(self) -> None:
        """Sets room aside for this layer's own values."""
        self.values = self.cache.new_store(self.span)

    def keep_first_values(self) -> None:
        """Sets room aside for the first layer's values in this layer's window, once per window."""
        self.values = self.cache.first_values(self.span)

    def keep_token_ids(self) -> None:
        """Sets room aside for the token ids, once for all layers."""
        self.cache.keep_token_ids()

    @property
    def token_ids(self) -> Tensor:
        """(B, S), int64, in the order of the keys."""
        return self.span.token_ids

    def keep_rows(self, table: HostTable) -> None:
        """Fetches the rows of new ids from a table outside of the device's memory."""
        self.cache.keep_rows(table)

    def rows(self, table: HostTable) -> tuple[Tensor, Tensor]:
        """The slots of `token_ids`, and the rows by slot."""
        return self.cache.slots.on_device[self.token_ids], self.cache.rows[table].wait()


class Cache:
    """The past of a batch of texts, to be passed to `Transformer.forward` with each new piece.

    Made by `Transformer.new_cache`. ``lengths`` (B,) int64 counts the tokens that each row has
    seen.
    """

    def __init__(
        self, config: TransformerConfig, blocks: "nn.ModuleList", batch_size: int,
        max_context: int, dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        """Sets all room aside; every block says through its values what it needs."""
        if batch_size < 1 or max_context < 1:
            raise UserError(
                f"a cache of {batch_size} rows and {max_context} tokens: at least 1 of both"
            )
        self.config, self._blocks = config, blocks
        self.batch_size, self.max_context = batch_size, max_context
        self.dtype, self.device = dtype, device
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._lengths = [0] * batch_size
        self._spans: dict[int | None, Span] = {}
        self.stores: list[Store] = []
        self._first_values: dict[Span, Store] = {}
        self.rows: dict[HostTable, BankRows] = {}
        self.slots: Slots | None = None
        self._whole = self.span(None)
        self._token_ids: Tensor | None = None
        if config.document_start is not None:
            self.keep_token_ids()
        self.previous_B1C = torch.zeros(batch_size, 1, config.d_model, dtype=dtype, device=device)
        """The last token's normed embedding, which the smear mixes into the next; zero at first."""
        self.layers: list[LayerCache] = []
        for block in blocks:
            layer = LayerCache(self, block.window)
            self.layers.append(layer)
            block.attention.value.reserve(layer)

    def span(self, window: int | None) -> Span:
        """The span of that window, shared by its layers."""
        return self._spans.setdefault(window, Span(window, self.max_context))

    def new_store(self, span: Span) -> Store:
        """Room for one key or value vector per kept token."""
        shape = (self.batch_size, self.config.n_kv_head, span.capacity, self.config.head_dim)
        self.stores.append(Store(span, torch.zeros(shape, dtype=self.dtype, device=self.device)))
        return self.stores[-1]

    def first_values(self, span: Span) -> Store:
        """The first layer's values within ``span``: its own store where its window is the same."""
        first = self.layers[0]
        if first.span is span:
            return first.values
        if span not in self._first_values:
            self._first_values[span] = self.new_store(span)
        return self._first_values[span]

    def keep_token_ids(self) -> None:
        """Sets room aside for the ids, (B, max_context) int64; once."""
        if self._token_ids is None:
            shape = (self.batch_size, self.max_context)
            self._token_ids = torch.zeros(shape, dtype=torch.int64, device=self.device)

    def keep_rows(self, table: HostTable) -> None:
        """Keeps the rows of seen ids on the device; once per table."""
        if self.slots is None:
            self.slots = Slots(self.config.padded_vocab_size, self.device)
        if table not in self.rows:
            self.rows[table] = BankRows(table, self.dtype, self.device)

    def begin(self, token_ids_BT: Tensor, lengths: Tensor | None) -> Tensor:
        """Starts a step; returns the positions of the new tokens, (1 or B, T).

        Raises:
            UserError: another batch size, no tokens, more than ``max_context`` of them, ids beyond
                the vocabulary, lengths that do not fit.
        """
        n_row, n_token = token_ids_BT.shape
        if n_row != self.batch_size:
            raise UserError(
                f"the cache holds {self.batch_size} rows, the batch {n_row}: make a cache for it"
            )
        if n_token == 0:
            raise UserError("no tokens: a text has at least one, such as <|bos|>")
        new = [n_token] * n_row if lengths is None else lengths.tolist()
        if len(new) != n_row or not all(0 <= n <= n_token for n in new):
            raise UserError(f"lengths {new} do not fit {n_row} rows of {n_token} tokens")
        step = Step(self._lengths, n_token, new, self.device)
        if max(step.after) > self.max_context:
            raise UserError(
                f"{max(step.after)} tokens do not fit into a context of {self.max_context}: give "
                "less text or a larger max_context"
            )
        # Ids that were sampled are right, and reading them back would make a GPU wait.
        if n_token > 1 or token_ids_BT.device.type == "cpu":
            low, high = (int(x) for x in token_ids_BT.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise UserError(
                    f"token id {low if low < 0 else high} is outside of the vocabulary of "
                    f"{self.config.vocab_size}"
                )
        if self.slots is not None:
            new_ids = self.slots.admit(token_ids_BT)
            for rows in self.rows.values():
                rows.prefetch(new_ids)
        for span in self._spans.values():
            span.begin(step, self._token_ids, self.config.document_start)
        if self._token_ids is not None:
            self._whole.write(self._token_ids[:, None, :, None], token_ids_BT[:, :, None, None])
        self._step = step
        return step.positions_BT

    @property
    def masks(self) -> dict[int | None, Tensor | None]:
        """The step's mask of each window, (1 or B, 1, T, S)."""
        return {window: span.mask for window, span in self._spans.items()}

    def take_previous(self, x_BTC: Tensor) -> Tensor:
        """The normed embedding before each row's new tokens; keeps that of the last of them."""
        previous, step = self.previous_B1C, self._step
        if step.uniform:
            last = x_BTC[:, -1:]
        else:
            index = (step.length_column - 1).clamp(min=0)[:, :, None].expand(-1, -1, x_BTC.shape[2])
            last = torch.where(step.length_column[:, :, None] > 0, x_BTC.gather(1, index), previous)
        self.previous_B1C = last.detach().to(previous.dtype, copy=True)
        return previous.to(x_BTC.dtype)

    def finish(self) -> None:
        """Counts the step's tokens."""
        self._lengths = self._step.after
        self.lengths = torch.tensor(self._lengths, device=self.device)
        for store in self.stores:
            store.release()

    def pretend(self, token_ids_BT: Tensor) -> None:
        """Counts tokens as seen without computing anything for them, for benchmarks."""
        n_row, n_token = token_ids_BT.shape
        self._lengths = [n_token] * n_row
        self.lengths = torch.tensor(self._lengths, device=self.device)
        if self._token_ids is not None:
            self._token_ids[:, :n_token] = token_ids_BT
        if self.slots is not None:
            new_ids = self.slots.admit(token_ids_BT)
            for rows in self.rows.values():
                rows.prefetch(new_ids)

    def select(self, rows: "Tensor | list[int]") -> "Cache":
        """An independent cache whose row i continues this one's row ``rows[i]``."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.device)
        if not all(0 <= row < self.batch_size for row in index.tolist()):
            raise UserError(f"rows {index.tolist()} are not rows of a cache of {self.batch_size}")
        chosen = Cache(
            self.config, self._blocks, len(index), self.max_context, self.dtype, self.device
        )
        chosen._lengths = [self._lengths[row] for row in index.tolist()]
        chosen.lengths, chosen.previous_B1C = self.lengths[index], self.previous_B1C[index]
        used = max(self._lengths)
        for source, copy in zip(self.stores, chosen.stores, strict=True):
            copy.kept[:, :, :used] = source.kept[index, :, :used]
        if self._token_ids is not None:
            chosen._token_ids[:, :used] = self._token_ids[index, :used]
        if self.slots is not None:
            chosen.slots = self.slots.copy()
            chosen.rows = {table: rows.copy() for table, rows in self.rows.items()}
        return chosen

    @property
    def nbytes_per_layer(self) -> list[int]:
        """Bytes of keys and values by layer; a store that layers share counts for the first."""
        seen: set[int] = set()
        sizes = []
        for layer in self.layers:
            stores = {id(s): s for s in (layer.keys, layer.values) if s and id(s) not in seen}
            seen |= set(stores)
            sizes.append(sum(store.kept.nbytes for store in stores.values()))
        return sizes

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept, token ids, the smear's state and fetched rows included."""
        ids = 0 if self._token_ids is None else self._token_ids.nbytes
        rows = sum(rows.nbytes for rows in self.rows.values())
        slots = 0 if self.slots is None else self.slots.on_device.nbytes
        shared = ids + self.previous_B1C.nbytes + self.lengths.nbytes + rows + slots
        return sum(self.nbytes_per_layer) + shared


def prefill(
    model: "Transformer", cache: Cache, token_ids_BT: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """Feeds new tokens in chunks; the logits (B, vocab_size) after each row's last one.

    ``lengths`` as in `Transformer.forward`; at least 1 everywhere.
    """
    n_row, n_token = token_ids_BT.shape
    lengths = torch.full((n_row,), n_token) if lengths is None else lengths.cpu()
    logits_BV = None
    for first in range(0, max(n_token, 1), PREFILL_CHUNK):
        chunk = token_ids_BT[:, first : first + PREFILL_CHUNK]
        new = (lengths - first).clamp(0, chunk.shape[1])
        last = (lengths - first - 1).clamp(0, max(chunk.shape[1] - 1, 0))
        whole = n_token and int(new.min()) == chunk.shape[1]
        found = model(
            chunk, cache=cache, lengths=None if whole else new,
            positions_BP=last[:, None].to(chunk.device),
        )[:, 0]  # fmt: skip
        if logits_BV is None:
            logits_BV = found
        else:
            logits_BV = torch.where((new > 0)[:, None].to(chunk.device), found, logits_BV)
    return logits_BV


# bov_lightning.model.transformer: The whole network on one page.

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
        previous_BTC = torch.cat((previous_B1C, x_BTC[:, :-1]), dim=1)
        gate = self.strength * torch.sigmoid(F.linear(x_BTC[..., : self.n_channel], self.gate))
        if starts_BT is not None:
            gate = gate.masked_fill(starts_BT[..., None], 0)
        return x_BTC + gate.to(x_BTC.dtype) * previous_BTC


class MLP(nn.Module):
    """W_2 relu(W_1 x)^2."""

    def __init__(self, d_model: int):
        super().__init__()
        self.input = Linear(d_model, 4 * d_model)
        self.output = Linear(4 * d_model, d_model)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.output(squared_relu(self.input(x_BTC)))


class Block(nn.Module):
    """Attention and MLP, each on the normed residual stream."""

    def __init__(self, config: TransformerConfig, values: LayerValues, window: int | None):
        super().__init__()
        self.window = window
        self.attention = Attention(config, values)
        self.mlp = MLP(config.d_model)

    def forward(self, x_BTC, x0_BTC, token_ids_BT, first_value, rotary, mask, past=None):
        """The residual stream after this block, and the block's value."""
        inputs = ValueInputs(rms_norm(x_BTC), x0_BTC, token_ids_BT, first_value)
        attended_BTC, value = self.attention(inputs, rotary, mask, past)
        x_BTC = x_BTC + attended_BTC
        return x_BTC + self.mlp(rms_norm(x_BTC)), value


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
        config, start = self.config, self.config.document_start
        pasts, previous_B1C = [None] * config.n_layer, None
        if cache is None:
            rotary = rotary_angles(token_ids_BT.shape[1], config.head_dim, token_ids_BT.device)
            masks = make_masks(config.windows, token_ids_BT, start)
        else:
            rotary = rotary_angles_at(cache.begin(token_ids_BT, lengths), config.head_dim)
            masks, pasts = cache.masks, cache.layers
        starts_BT = None if start is None else token_ids_BT == start
        x_BTC = rms_norm(self.embedding(token_ids_BT))
        if cache is not None:
            previous_B1C = cache.take_previous(x_BTC)
        x_BTC = x0_BTC = self.smear(x_BTC, starts_BT, previous_B1C)
        first_value = None
        for block, past in zip(self.blocks, pasts, strict=True):
            mask = masks[block.window]
            x_BTC, value = block(x_BTC, x0_BTC, token_ids_BT, first_value, rotary, mask, past)
            first_value = value if first_value is None else first_value
        if cache is not None:
            cache.finish()
        if positions_BP is not None:
            x_BTC = x_BTC.gather(1, positions_BP[:, :, None].expand(-1, -1, config.d_model))
        return self.head(rms_norm(x_BTC), targets_BT, reduction)

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

    def grouped_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by optimizer group; what no module names is a matrix."""
        groups: dict[str, list[nn.Parameter]] = {}
        for module in self.modules():
            names = getattr(module, "optimizer_groups", {})
            for name, parameter in module.named_parameters(recurse=False):
                groups.setdefault(names.get(name, "matrix"), []).append(parameter)
        return groups


# bov_lightning.hf_model: The network as a `transformers` model, with its cache and `generate`.

class BoVConfig(PreTrainedConfig):
    """`TransformerConfig`, flat, with the names that `transformers` looks for as aliases."""

    model_type = "bov"
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "max_context",
    }

    def __init__(
        self, n_layer=2, n_head=2, n_kv_head=2, d_model=64, vocab_size=256, sequence_len=64,
        window_pattern="L", document_start=None, value=None, max_context=None, **kwargs,
    ):  # fmt: skip
        """See `TransformerConfig`; ``max_context`` is what a cache has room for by default."""
        self.n_layer, self.n_head, self.n_kv_head = n_layer, n_head, n_kv_head
        self.d_model, self.vocab_size, self.sequence_len = d_model, vocab_size, sequence_len
        self.window_pattern, self.document_start = window_pattern, document_start
        self.value = dict(value or {})
        self.max_context = max_context or 10 * sequence_len
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    def transformer_config(self) -> TransformerConfig:
        """The network's own configuration."""
        names = TransformerConfig.__dataclass_fields__.keys() - {"value"}
        shape = {name: getattr(self, name) for name in names}
        return TransformerConfig(**shape, value=ValueConfig(**self.value))


class BoVCache(transformers.Cache):
    """`Cache` in the place of a `transformers` cache; room is set aside at the first call."""

    def __init__(self, max_context: int):
        super().__init__(layers=[])
        self.max_context = max_context
        self.past: Cache | None = None
        self.n_column = 0
        """Columns of input_ids seen, padding included."""

    def open(self, model: Transformer, input_ids: Tensor) -> Cache:
        """The network's cache, for new tokens (B, T)."""
        if self.past is None:
            self.past = model.new_cache(len(input_ids), self.max_context)
        self.n_column += input_ids.shape[1]
        return self.past

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input_ids that were seen."""
        return self.n_column

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self.max_context

    get_max_cache_shape = get_max_length

    @property
    def is_compileable(self) -> bool:
        """No: it grows by Python's counting."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether anything was seen."""
        return self.past is not None

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return 0 if self.past is None else self.past.nbytes

    def __len__(self):
        return 0 if self.past is None else len(self.past.layers)

    def reset(self) -> None:
        """Forgets everything."""
        self.past, self.n_column = None, 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps those rows, in that order."""
        self.past = self.past.select(indices)

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self.past = self.past.select(
            [row for row in range(self.past.batch_size) for _ in range(repeats)]
        )

    def crop(self, max_length: int) -> None:
        """Refused: a window's ring has already forgotten what cropping would bring back."""
        raise NotImplementedError("a BoV cache cannot be cropped: assisted generation needs that")


class BoVForCausalLM(PreTrainedModel, GenerationMixin):
    """`Transformer` for `transformers`: padding on either side, labels, caches, generation."""

    config_class = BoVConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: BoVConfig):
        super().__init__(config)
        self.model = Transformer(config.transformer_config())
        self.post_init()

    def _init_weights(self, module) -> None:
        # The network fills its own parameters.
        pass

    def get_input_embeddings(self):
        """The token embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value) -> None:
        """Replaces the token embedding."""
        self.model.embedding = value

    def get_output_embeddings(self):
        """None: the head is no linear layer."""

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = BoVCache(max(max_cache_length, 1))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: BoVCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, vocab_size), or of the last ``logits_to_keep`` tokens, in fp32.

        ``attention_mask`` (B, at least T), whose last T columns belong to ``input_ids``: 0 is
        padding, on whichever side. ``labels`` are shifted here; -100 is not counted.
        """
        n_token = input_ids.shape[1]
        order = lengths = None
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError("attention_mask must be (batch, time): the network is causal")
            real = attention_mask[:, -n_token:].bool()
            if not real.all():
                order, lengths = (~real).long().argsort(dim=1, stable=True), real.sum(1)
                input_ids = input_ids.gather(1, order)
        # Padding is moved to the right for the network, and its logits back to where it was.
        n_kept = min(logits_to_keep or n_token, n_token)
        kept = torch.arange(n_token, device=input_ids.device)[-n_kept:].expand(len(input_ids), -1)
        positions = kept if order is None else order.argsort(1).gather(1, kept)
        if past_key_values is None and use_cache:
            past_key_values = BoVCache(self.config.max_context)
        if past_key_values is None:
            logits = self.model(input_ids, positions_BP=positions)
        else:
            past = past_key_values.open(self.model, input_ids)
            ends = (
                positions == n_token - 1 if lengths is None else positions == lengths[:, None] - 1
            )
            if n_kept == 1 and bool(ends.all()):
                logits = prefill(self.model, past, input_ids, lengths)[:, None]
            else:
                logits = self.model(input_ids, cache=past, lengths=lengths, positions_BP=positions)
        loss = None
        if labels is not None:
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1), shifted.flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
