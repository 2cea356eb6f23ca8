"""Causal attention with rotary embeddings, grouped heads and sliding windows.

Shapes: B batch, T time, C = d_model, H query heads, K key-value heads, D head dimension.
"""

import math
from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ROTARY_BASE = 100_000
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""PyTorch's kernels for a past that grows: cuDNN's plans every new length first, for 40 ms."""

QK_SCALE = 1.2
"""Normed queries and keys are both multiplied by this; `attention_scale` does it in one product."""


def attention_scale(head_dim: int) -> float:
    """What products of normed queries and keys are multiplied by."""
    return QK_SCALE**2 / head_dim**0.5


def rotary_angles_at(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles at ``positions`` (...), each (..., 1, D), fp32.

    Of both halves of the head dimension; the sine carries the sign of each.
    """
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / (ROTARY_BASE ** (channel / head_dim))
    angle = positions.float()[..., None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1)[..., None, :], torch.cat((sin, -sin), dim=-1)[..., None, :]


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of the head dimension against each other; keeps the dtype.

    ``cos`` and ``sin`` are `rotary_angles_at` positions (T,), or (B, T) where rows stand at
    different ones.
    """
    return _Rotation.apply(x_BTHD, cos.to(x_BTHD.dtype), sin.to(x_BTHD.dtype))


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


LEAST_FLEX_HEAD = 16
"""Channels per head that FlexAttention asks for on CUDA."""

Mask = Union[Tensor, "BlockMask", int, None]
"""What `attend` takes: (T, T) or (B, 1, T, T) bool, True where a query (row) sees a key (column);
FlexAttention's form of it on CUDA; a window, in tokens; None for plain causal attention."""


def _band(n_token: int, window: int, device: torch.device) -> Tensor:
    """(T, T) bool: what each token sees of a window."""
    position = torch.arange(n_token, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance <= window)


@lru_cache(maxsize=8)
def _window_mask(n_token: int, window: int, device: torch.device) -> Tensor:
    # Validation runs in inference mode; a mask born there could not be used in training.
    with torch.inference_mode(False):
        return _band(n_token, window, device)


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
    windows: list[int | None],
    token_ids_BT: Tensor,
    document_start: int | None,
    starts_BT: Tensor | None = None,
) -> dict[int | None, Mask]:
    """The mask of each window: a token sees itself and ``window`` tokens to its left.

    With ``document_start``, it sees none from before the last such token; with ``starts_BT`` (bool)
    none from before the last token where that is True.
    """
    n_token, device = token_ids_BT.shape[1], token_ids_BT.device
    if document_start is not None:
        own_BT = token_ids_BT == document_start
        starts_BT = own_BT if starts_BT is None else own_BT | starts_BT
    document_BT = None if starts_BT is None else starts_BT.cumsum(1)
    if torch.compiler.is_exporting():
        return _masks_of_any_length(windows, document_BT, n_token, device)
    flex = device.type == "cuda"
    masks: dict[int | None, Mask] = {}
    for window in set(windows):
        reach = n_token - 1 if window is None else min(window, n_token - 1)
        if document_BT is not None:
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


def _masks_of_any_length(
    windows: list[int | None], document_BT: Tensor | None, n_token: int, device: torch.device
) -> dict[int | None, Mask]:
    """`make_masks` for `torch.export`, whose graph must not depend on how long the text is."""
    masks: dict[int | None, Mask] = {}
    for window in set(windows):
        if window is None and document_BT is None:
            masks[window] = None
            continue
        masks[window] = _band(n_token, n_token if window is None else window, device)
        if document_BT is not None:
            same_BTT = document_BT[:, :, None] == document_BT[:, None]
            masks[window] = (same_BTT & masks[window])[:, None]
    return masks


def allow_many_graphs() -> None:
    """After eight graphs of one function the compiler would run the rest uncompiled, and only log
    it; windows, value sources, documents and the modes of training and validation make more."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


@lru_cache(maxsize=1)
def _compiled_flex_attention():
    allow_many_graphs()
    return torch.compile(_flex_attention)


def _flex_attention(*arguments, **how) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(*arguments, **how)


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
        # FlexAttention takes no narrower heads; zeros change neither scores nor values.
        narrow = max(0, LEAST_FLEX_HEAD - v_BKTD.shape[3])
        if narrow:
            q_BHTD, k_BKTD, v_BKTD = (F.pad(x, (0, narrow)) for x in (q_BHTD, k_BKTD, v_BKTD))
        # Uncompiled it would hold all scores; inside a compiled block it is part of its graph.
        compiled = torch.compiler.is_compiling()
        flex_attention = _flex_attention if compiled else _compiled_flex_attention()
        y_BHTD = flex_attention(q_BHTD, k_BKTD, v_BKTD, block_mask=mask, **how)
        return y_BHTD[..., : y_BHTD.shape[3] - narrow]
    is_causal = False
    # Decided here: lengths are symbols while a graph of any length is exported.
    if mask is None and q_BHTD.shape[2] == k_BKTD.shape[2]:
        is_causal = True
    with nullcontext() if is_causal or not q_BHTD.is_cuda else sdpa_kernel(ANY_LENGTH):
        return F.scaled_dot_product_attention(
            q_BHTD, k_BKTD, v_BKTD,
            attn_mask=mask, is_causal=is_causal, **how,
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
