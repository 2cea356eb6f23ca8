"""Triton kernels: q.K^T, softmax and the values in one pass over the past, for one new token.

The past is split over programs, each with its own online softmax (Milakov and Gimelshein, 2018), so
that one row of a batch keeps a whole GPU busy; the last program of a head to end joins their
results. Values are made of rows of a table, or kept. `bov_lightning.model.decode` holds the same in
PyTorch, which this is tested against.
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

BLOCK_S = 128
"""Past tokens that a program reads at a time."""

BLOCK_PARTS = 32
"""Parts that are joined at a time."""

PROGRAMS = 384
"""About how many programs a call starts: three per multiprocessor of a large GPU."""

WARPS = 4
"""Of each program."""

if triton is not None:
    # Numbers that grow with the text are no constants of the compiled kernel: it is compiled once.
    GROWING = ["ids_row", "mask_row", "pages_row", "n_past", "per_split", "n_split", "n_part"]

    @triton.jit
    def join_parts(
        parts, out, bag, n_split, n_part,
        DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One head's attention to all parts of the past."""
        d = tl.arange(0, BLOCK_D)
        highest = -float("inf")
        weight_sum = 0.0
        value_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for start in range(0, n_split, BLOCK):
            s = start + tl.arange(0, BLOCK)
            there = s < n_split
            part = bag * n_split + s
            read = there[:, None] & (d < DIM)[None, :]
            # From the L2 cache, which all multiprocessors write through.
            at = parts + n_part * DIM + part
            peak = tl.load(at, mask=there, other=-float("inf"), cache_modifier=".cg")
            total = tl.load(at + n_part, mask=there, other=0.0, cache_modifier=".cg")
            at = parts + part[:, None] * DIM + d[None, :]
            found = tl.load(at, mask=read, other=0.0, cache_modifier=".cg")
            new_highest = tl.maximum(highest, tl.max(peak, 0))
            shift = tl.where(new_highest == -float("inf"), 0.0, new_highest)
            share = tl.exp(peak - shift)
            decay = tl.exp(highest - shift)
            value_sum = value_sum * decay + tl.sum(share[:, None] * found, 0)
            weight_sum = weight_sum * decay + tl.sum(share * total, 0)
            highest = new_highest
        # Padding sees nothing.
        y = value_sum / tl.where(weight_sum == 0, 1.0, weight_sum)
        tl.store(out + bag * DIM + d, y.to(out.dtype.element_ty), mask=d < DIM)

    # The first id or mask that a window reaches moves with every token.
    @triton.jit(do_not_specialize=GROWING, do_not_specialize_on_alignment=["ids", "mask"])
    def attend_split(
        q, k, ids, weights, values, mask, spans, pages, parts, ended, out,
        k_row, k_head, k_token, v_row, v_head, v_token, ids_row, mask_row, pages_row,
        n_past, per_split, n_split, n_part, scale,
        HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr,
        PAGE: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    ):  # fmt: skip
        """One head's attention to one part of the past; the last program of a head joins its parts.

        A part is the unscaled output, the maximum and the sum of its softmax. ``ended`` counts a
        head's programs; it is zero before and after.

        PAGE > 0: keys and ids lie in pages of so many slots, whose strides are ``k_row`` and so on,
        and ``spans`` says of each row of queries which row of ``pages`` lists them, and the first
        and the last (exclusive) position that it sees.
        """
        # Programs of one head follow one another: its columns of a table then stay in the L2 cache.
        row, split, head = tl.program_id(0) // n_split, tl.program_id(0) % n_split, tl.program_id(1)
        bag = row * HEADS + head
        kv_head = (head // GROUP).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        query = tl.load(q + bag * DIM + d, mask=d < DIM, other=0.0).to(tl.float32) * scale
        begin, end = 0, n_past
        if PAGE > 0:
            pages += tl.load(spans + row * 3).to(tl.int64) * pages_row
            begin, end = tl.load(spans + row * 3 + 1), tl.load(spans + row * 3 + 2)
            per_split = tl.cdiv(tl.cdiv(end - begin, n_split), BLOCK) * BLOCK
            k += kv_head * k_head
        else:
            k += row.to(tl.int64) * k_row + kv_head * k_head
            ids += row.to(tl.int64) * ids_row
        values += row.to(tl.int64) * v_row + kv_head * v_head
        mask += row.to(tl.int64) * mask_row
        highest = -float("inf")
        weight_sum = 0.0
        value_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
        first = begin + split * per_split
        last = tl.minimum(first + per_split, end)
        for start in range(first, last, BLOCK):
            s = start + tl.arange(0, BLOCK)
            seen = s < last
            if MASKED:
                seen = seen & (tl.load(mask + s, mask=seen, other=0) != 0)
            read = seen[:, None] & (d < DIM)[None, :]
            # All that is read is asked for before anything is waited for. Keys come once; a
            # table's rows come again.
            slot, place = s, s.to(tl.int64) * k_token
            if PAGE > 0:
                page = tl.load(pages + s // PAGE, mask=seen, other=0).to(tl.int64)
                slot, place = page * PAGE + s % PAGE, page * k_row + s % PAGE * k_token
            at = place[:, None] + d[None, :]
            keys = tl.load(k + at, mask=read, other=0.0, eviction_policy="evict_first")
            which = s.to(tl.int64)
            if ROWS > 0:
                which = tl.load(ids + slot * ROWS, mask=seen, other=0).to(tl.int64)
            at = which[:, None] * v_token + d[None, :]
            value = tl.load(values + at, mask=read, other=0.0)
            if WEIGHTED:
                value = value.to(tl.float32) * tl.load(weights)
                for r in tl.static_range(1, ROWS):
                    which = tl.load(ids + slot * ROWS + r, mask=seen, other=0).to(tl.int64)
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
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        if tl.atomic_add(ended + bag, 1, sem="acq_rel") == n_split - 1:
            join_parts(parts, out, bag, n_split, n_part, DIM, BLOCK_D, BLOCK_PARTS)
            tl.store(ended + bag, 0)


@lru_cache(maxsize=8)
def _on_device(row_weights: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(row_weights, device=device)


_ended: dict[torch.device, list[Tensor]] = {}


def _ended_on(device: torch.device, n_bag: int) -> Tensor:
    """Zeros for a kernel to count in, which leaves zeros for the next one on that device.

    Two streams of one device must not run such kernels at the same time.
    """
    made = _ended.setdefault(device, [])
    if made and len(made[-1]) >= n_bag:
        return made[-1]
    with torch.inference_mode(False):
        zeros = torch.zeros(2 ** max(12, n_bag.bit_length()), dtype=torch.int32, device=device)
    # What a graph records fills nothing until it is replayed: such zeros are that graph's own.
    if device.type == "cpu" or not torch.cuda.is_current_stream_capturing():
        made.append(zeros)  # those before stay: graphs that were recorded with them write there
    return zeros


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

    Nothing here waits for the device, and without a mask nothing but the kernel runs.
    """
    n_row, n_head, _, head_dim = q_BHTD.shape
    n_past = k_BKSD.shape[2]
    n_bag = n_row * n_head
    n_split = max(1, min(-(-PROGRAMS // n_bag), -(-n_past // BLOCK_S)))
    per_split = -(-n_past // (n_split * BLOCK_S)) * BLOCK_S
    n_split = -(-n_past // per_split)
    seen_BS = ids_BS = None
    if mask is not None:
        seen_BS = _dense(mask[:, 0, 0].expand(n_row, -1)).view(torch.uint8)
    if row_ids is not None:
        ids_BS = _dense(row_ids.reshape(len(row_ids), -1).expand(n_row, -1))
    return _launch(
        q_BHTD, _dense(k_BKSD), values, strides, ids_BS, row_weights, seen_BS,
        n_past=n_past, per_split=per_split, n_split=n_split, scale=attention_scale(head_dim),
    )  # fmt: skip


def _launch(
    q: Tensor, k: Tensor, values: Tensor, strides: tuple[int, int, int], ids: Tensor | None,
    row_weights: tuple[float, ...], seen: Tensor | None, spans: Tensor | None = None,
    pages: Tensor | None = None, n_slot: int = 0, *, n_past: int, per_split: int, n_split: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """Attention in the shape of ``q``, whose first two dimensions are rows and heads.

    ``n_slot``: of a page, where ``k`` and ``ids`` are pages.
    """
    (n_row, n_head), head_dim, n_kv_head = q.shape[:2], q.shape[-1], k.shape[1]
    n_bag = n_row * n_head
    parts = q.new_empty(n_bag * n_split * (head_dim + 2), dtype=torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q = q.contiguous()
    weighted = row_weights not in ((), (1.0,))
    weights = _on_device(row_weights, q.device) if weighted else None

    def at(x: Tensor | None) -> Tensor:
        return q if x is None else x  # something to point to, which is not read

    def row(x: Tensor | None) -> int:
        return 0 if x is None else x.stride(0)

    block_d = triton.next_power_of_2(head_dim)
    # Triton launches where the current device is.
    with torch.cuda.device_of(out):
        attend_split[(n_row * n_split, n_head)](
            q, k, at(ids), at(weights), values, at(seen), at(spans), at(pages), parts,
            _ended_on(out.device, n_bag), out, *k.stride()[:3], *strides, row(ids), row(seen),
            row(pages), n_past, per_split, n_split, n_bag * n_split, scale,
            HEADS=n_head, GROUP=n_head // n_kv_head, DIM=head_dim, BLOCK_D=block_d, BLOCK=BLOCK_S,
            ROWS=len(row_weights), WEIGHTED=weighted, MASKED=seen is not None, PAGE=n_slot,
            BLOCK_PARTS=BLOCK_PARTS, num_warps=WARPS,
        )  # fmt: skip
    return out


def attend_pages_fused(
    q_THD: Tensor, pages_NKPD: Tensor, page_ids_NPR: Tensor, table: Tensor, spans_T3: Tensor,
    page_table_RM: Tensor, scale: float, row_weights: tuple[float, ...] | None = None,
) -> Tensor:  # fmt: skip
    """Attention (T, H, D) of the new tokens of R requests, whose past lies in pages of P slots.

    No shape depends on what the tensors hold, so that a CUDA graph can record it. A prompt's tokens
    are read one by one, each with the whole past before it: right, but slow for long prompts.
    Padding gets zero.

    Args:
        pages_NKPD: keys, in any order of pages; the last dimension dense.
        page_ids_NPR: numbers of the rows that the values of their slots are made of, dense; (N, P)
            where that is one.
        spans_T3: int32, from `token_spans`.
        page_table_RM: int32, the pages of each request in the order of its text.
        scale: what products of queries and keys are multiplied by.
        row_weights: what each of a value's rows is multiplied by; None: it is one row.
    """
    n_token, n_head, head_dim = q_THD.shape
    n_slot = pages_NKPD.shape[2]
    longest = page_table_RM.shape[1] * n_slot
    n_split = max(1, min(-(-PROGRAMS // (n_token * n_head)), -(-longest // BLOCK_S)))
    return _launch(
        q_THD, pages_NKPD, table, (0, head_dim, table.stride(0)), page_ids_NPR,
        row_weights or (1.0,), None, spans_T3, page_table_RM, n_slot,
        n_past=0, per_split=0, n_split=n_split, scale=scale,
    )  # fmt: skip


def token_spans(
    n_token: int, query_start_R1: Tensor, n_past_R: Tensor, window: int | None
) -> Tensor:
    """(T, 3) int32: of each new token its request, and the first and last (exclusive) it sees.

    Args:
        query_start_R1: (R + 1,) rows at which the requests' new tokens start; the last one's end.
            Rows from there on are padding and see nothing.
        n_past_R: (R,) tokens of each request, the new ones included.
        window: how many tokens to its left a token sees; None: all.
    """
    row_T = torch.arange(n_token, device=n_past_R.device, dtype=query_start_R1.dtype)
    request_T = torch.searchsorted(query_start_R1[1:].contiguous(), row_T, right=True)
    request_T = request_T.clamp(max=len(n_past_R) - 1)
    end_T = n_past_R[request_T] - query_start_R1[request_T + 1] + row_T + 1
    end_T = end_T.where(row_T < query_start_R1[-1], 0)
    start_T = torch.zeros_like(end_T) if window is None else (end_T - 1 - window).clamp(min=0)
    return torch.stack((request_T, start_T, end_T), dim=1).int()
