"""One Triton kernel: q.K^T, softmax and the value rows of a table in one pass over the past.

The past is split over programs, each with its own online softmax (Milakov and Gimelshein, 2018),
and their results are combined at the end, so that one row of a batch keeps a whole GPU busy.
`bov_lightning.model.decode` holds the same in PyTorch, which this is tested against.
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

PROGRAMS = 1024
"""About how many programs a call starts: several per multiprocessor of a large GPU."""

if triton is not None:

    @triton.jit
    def attend_split(
        q, k, row_ids, row_weights, table, mask, out, peak, total,
        k_row, k_head, k_token, ids_row, table_row, mask_row,
        n_past, per_split, scale,
        HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr,
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
            value_sum = value_sum * decay
            for r in tl.static_range(ROWS):
                ids = tl.load(row_ids + row * ids_row + s * ROWS + r, mask=seen, other=0)
                rows = ids[:, None].to(tl.int64) * table_row + kv_head * DIM + d[None, :]
                values = tl.load(table + rows, mask=read, other=0.0).to(tl.float32)
                if WEIGHTED:
                    values = values * tl.load(row_weights + r)
                value_sum += tl.sum(weight[:, None] * values, 0)
            weight_sum = weight_sum * decay + tl.sum(weight, 0)
            highest = new_highest
        part = bag * tl.num_programs(1) + split
        tl.store(out + part * DIM + d, value_sum, mask=d < DIM)
        tl.store(peak + part, highest)
        tl.store(total + part, weight_sum)


@lru_cache(maxsize=8)
def _on_device(row_weights: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(row_weights, device=device)


def attend_fused(
    q_BHTD: Tensor, k_BKSD: Tensor, row_ids: Tensor, table: Tensor, mask: Mask,
    row_weights: tuple[float, ...] | None = None,
) -> Tensor:  # fmt: skip
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
    n_lookup = 1 if row_weights is None else len(row_weights)
    ids = row_ids.reshape(len(row_ids), -1).expand(n_row, -1).contiguous()
    weighted = n_lookup > 1 or row_weights not in (None, (1.0,))
    attend_split[(n_bag, n_split)](
        q_BHTD.contiguous(), k_BKSD, ids,
        _on_device(row_weights, ids.device) if weighted else ids,
        table, ids if seen_BS is None else seen_BS,
        out, peak, total,
        k_BKSD.stride(0), k_BKSD.stride(1), k_BKSD.stride(2), ids.stride(0), table.stride(0),
        n_past, n_past, per_split, attention_scale(head_dim),
        HEADS=n_head, GROUP=n_head // n_kv_head, DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), BLOCK=BLOCK_S, MASKED=seen_BS is not None,
        ROWS=n_lookup, WEIGHTED=weighted,
    )  # fmt: skip
    share = (peak - peak.amax(1, keepdim=True)).exp()
    y = (out * share[:, :, None]).sum(1) / (total * share).sum(1)[:, None]
    return y.view(n_row, n_head, 1, head_dim).to(q_BHTD.dtype)
