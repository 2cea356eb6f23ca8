"""Triton kernels: q.K^T, softmax and the values in one pass over the past, for one new token.

The past is split over programs, each with its own online softmax (Milakov and Gimelshein, 2018), so
that one row of a batch keeps a whole GPU busy; a second, small kernel joins their results. Values
are made of rows of a table, or kept. `bov_lightning.model.decode` holds the same in PyTorch, which
this is tested against.
"""

from functools import lru_cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from bov_lightning.model.attention import Mask, attention_scale

BLOCK_S = 64
"""Past tokens that a program reads at a time."""

BLOCK_PARTS = 32
"""Parts that are joined at a time."""

PROGRAMS = 1024
"""About how many programs a call starts: several per multiprocessor of a large GPU."""

WARPS = 4
"""Of each program."""

if triton is not None:
    # Numbers that grow with the text are no constants of the compiled kernel: it is compiled once.
    GROWING = ["ids_row", "mask_row", "n_past", "per_split", "n_split", "n_part"]

    # The first id or mask that a window reaches moves with every token.
    @triton.jit(do_not_specialize=GROWING, do_not_specialize_on_alignment=["ids", "mask"])
    def attend_split(
        q, k, ids, weights, values, mask, parts,
        k_row, k_head, k_token, v_row, v_head, v_token, ids_row, mask_row,
        n_past, per_split, n_split, n_part, scale,
        HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        """One head's attention to one part of the past: unscaled output, its maximum and sum."""
        # Programs of one head follow one another: its columns of a table then stay in the L2 cache.
        row, split, head = tl.program_id(0) // n_split, tl.program_id(0) % n_split, tl.program_id(1)
        bag = row * HEADS + head
        kv_head = (head // GROUP).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        query = tl.load(q + bag * DIM + d, mask=d < DIM, other=0.0).to(tl.float32) * scale
        k += row.to(tl.int64) * k_row + kv_head * k_head
        values += row.to(tl.int64) * v_row + kv_head * v_head
        ids += row.to(tl.int64) * ids_row
        mask += row.to(tl.int64) * mask_row
        highest = -float("inf")
        weight_sum = 0.0
        value_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
        first = split * per_split
        last = tl.minimum(first + per_split, n_past)
        for start in range(first, last, BLOCK):
            s = start + tl.arange(0, BLOCK)
            seen = s < last
            if MASKED:
                seen = seen & (tl.load(mask + s, mask=seen, other=0) != 0)
            read = seen[:, None] & (d < DIM)[None, :]
            # All that is read is asked for before anything is waited for. Keys come once; a
            # table's rows come again.
            at = s.to(tl.int64)[:, None] * k_token + d[None, :]
            keys = tl.load(k + at, mask=read, other=0.0, eviction_policy="evict_first")
            which = s.to(tl.int64)
            if ROWS > 0:
                which = tl.load(ids + s * ROWS, mask=seen, other=0).to(tl.int64)
            at = which[:, None] * v_token + d[None, :]
            value = tl.load(values + at, mask=read, other=0.0)
            if WEIGHTED:
                value = value.to(tl.float32) * tl.load(weights)
                for r in tl.static_range(1, ROWS):
                    which = tl.load(ids + s * ROWS + r, mask=seen, other=0).to(tl.int64)
                    at = which[:, None] * v_token + d[None, :]
                    more = tl.load(values + at, mask=read, other=0.0).to(tl.float32)
                    value += more * tl.load(weights + r)
            score = tl.sum(keys.to(tl.float32) * query[None, :], 1)
            score = tl.where(seen, score, -float("inf"))
            new_highest = tl.maximum(highest, tl.max(score, 0))
            # A part that sees nothing keeps -inf, whose difference from itself would be NaN.
            shift = tl.where(new_highest == -float("inf"), 0.0, new_highest)
            weight = tl.exp(score - shift)
            decay = tl.exp(highest - shift)
            value_sum = value_sum * decay + tl.sum(weight[:, None] * value.to(tl.float32), 0)
            weight_sum = weight_sum * decay + tl.sum(weight, 0)
            highest = new_highest
        part = bag * n_split + split
        tl.store(parts + part * DIM + d, value_sum, mask=d < DIM)
        tl.store(parts + n_part * DIM + part, highest)
        tl.store(parts + n_part * (DIM + 1) + part, weight_sum)

    @triton.jit(do_not_specialize=["n_split", "n_part"])
    def join_parts(
        parts, out, n_split, n_part,
        DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One head's attention to all parts of the past."""
        bag = tl.program_id(0)
        d = tl.arange(0, BLOCK_D)
        highest = -float("inf")
        weight_sum = 0.0
        value_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for start in range(0, n_split, BLOCK):
            s = start + tl.arange(0, BLOCK)
            there = s < n_split
            part = bag * n_split + s
            peak = tl.load(parts + n_part * DIM + part, mask=there, other=-float("inf"))
            total = tl.load(parts + n_part * (DIM + 1) + part, mask=there, other=0.0)
            read = there[:, None] & (d < DIM)[None, :]
            found = tl.load(parts + part[:, None] * DIM + d[None, :], mask=read, other=0.0)
            new_highest = tl.maximum(highest, tl.max(peak, 0))
            shift = tl.where(new_highest == -float("inf"), 0.0, new_highest)
            share = tl.exp(peak - shift)
            decay = tl.exp(highest - shift)
            value_sum = value_sum * decay + tl.sum(share[:, None] * found, 0)
            weight_sum = weight_sum * decay + tl.sum(share * total, 0)
            highest = new_highest
        y = value_sum / weight_sum
        tl.store(out + bag * DIM + d, y.to(out.dtype.element_ty), mask=d < DIM)


@lru_cache(maxsize=8)
def _on_device(row_weights: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(row_weights, device=device)


def attend_fused(
    q_BHTD: Tensor, k_BKSD: Tensor, row_ids: Tensor, table: Tensor, mask: Mask,
    row_weights: tuple[float, ...] | None = None,
) -> Tensor:  # fmt: skip
    """`attend_bank` of one new token per row, in one kernel; its arguments and result."""
    strides = (0, q_BHTD.shape[3], table.stride(0))
    return _attend_in_parts(q_BHTD, k_BKSD, table, strides, mask, row_ids, row_weights or (1.0,))


def attend_kept(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask) -> Tensor:
    """`attend_values` of one new token per row, in one kernel; its arguments and result."""
    v_BKSD = _dense(v_BKSD)
    return _attend_in_parts(q_BHTD, k_BKSD, v_BKSD, v_BKSD.stride()[:3], mask)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _attend_in_parts(
    q_BHTD: Tensor, k_BKSD: Tensor, values: Tensor, strides: tuple[int, int, int], mask: Mask,
    row_ids: Tensor | None = None, row_weights: tuple[float, ...] = (),
) -> Tensor:  # fmt: skip
    """``strides`` of the values: from row to row, from head to head, from token or id to the next.

    Nothing here waits for the device, and without a mask nothing but the two kernels runs.
    """
    n_row, n_head, _, head_dim = q_BHTD.shape
    n_kv_head, n_past = k_BKSD.shape[1:3]
    n_bag = n_row * n_head
    n_split = max(1, min(-(-PROGRAMS // n_bag), -(-n_past // BLOCK_S)))
    per_split = -(-n_past // (n_split * BLOCK_S)) * BLOCK_S
    n_split = -(-n_past // per_split)
    parts = q_BHTD.new_empty(n_bag * n_split * (head_dim + 2), dtype=torch.float32)
    out = torch.empty(q_BHTD.shape, dtype=q_BHTD.dtype, device=q_BHTD.device)
    k_BKSD, q_BHTD = _dense(k_BKSD), q_BHTD.contiguous()
    seen_BS = ids_BS = weights = q_BHTD  # something to point to, which is not read
    if mask is not None:
        seen_BS = _dense(mask[:, 0, 0].expand(n_row, -1)).view(torch.uint8)
    if row_ids is not None:
        ids_BS = _dense(row_ids.reshape(len(row_ids), -1).expand(n_row, -1))
    weighted = row_weights not in ((), (1.0,))
    if weighted:
        weights = _on_device(row_weights, q_BHTD.device)
    block_d = triton.next_power_of_2(head_dim)
    # Triton launches where the current device is.
    with torch.cuda.device_of(out):
        attend_split[(n_row * n_split, n_head)](
            q_BHTD, k_BKSD, ids_BS, weights, values, seen_BS, parts,
            *k_BKSD.stride()[:3], *strides, ids_BS.stride(0), seen_BS.stride(0),
            n_past, per_split, n_split, n_bag * n_split, attention_scale(head_dim),
            HEADS=n_head, GROUP=n_head // n_kv_head, DIM=head_dim, BLOCK_D=block_d, BLOCK=BLOCK_S,
            ROWS=len(row_weights), WEIGHTED=weighted, MASKED=mask is not None, num_warps=WARPS,
        )  # fmt: skip
        join_parts[(n_bag,)](
            parts, out, n_split, n_bag * n_split,
            DIM=head_dim, BLOCK_D=block_d, BLOCK=BLOCK_PARTS, num_warps=WARPS,
        )  # fmt: skip
    return out
