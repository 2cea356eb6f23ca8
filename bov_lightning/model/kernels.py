"""One Triton kernel: q.K^T, softmax and the value rows of a bank in one pass over the past.

The past is split over programs, each with its own online softmax (Milakov and Gimelshein, 2018),
and their results are combined at the end, so that one row of a batch keeps a whole GPU busy.
`bov_lightning.model.decode` holds the same in PyTorch, which this is tested against.
"""

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
        q, k, token_ids, table, mask, spans, pages, out, peak, total,
        k_row, k_head, k_token, ids_row, table_row, mask_row, pages_row,
        n_past, per_split, scale,
        HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK: tl.constexpr, MASKED: tl.constexpr, PAGE: tl.constexpr,
    ):  # fmt: skip
        """One head's attention to one part of the past: unscaled output, its maximum and sum.

        PAGE > 0: keys and ids lie in pages of so many slots, and ``spans`` says of each row which
        row of ``pages`` lists them, and the first and the last (exclusive) position that it sees.
        """
        bag, split = tl.program_id(0), tl.program_id(1)
        row, head = bag // HEADS, bag % HEADS
        kv_head = head // GROUP
        d = tl.arange(0, BLOCK_D)
        query = tl.load(q + bag * DIM + d, mask=d < DIM, other=0.0).to(tl.float32) * scale
        highest = -float("inf")
        weight_sum = 0.0
        value_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
        begin, end = 0, n_past
        if PAGE:
            begin, end = tl.load(spans + row * 3 + 1), tl.load(spans + row * 3 + 2)
            n_part = tl.num_programs(1) * BLOCK
            per_split = (end - begin + n_part - 1) // n_part * BLOCK
        first = begin + split * per_split
        last = tl.minimum(first + per_split, end)
        for start in range(first, last, BLOCK):
            s = start + tl.arange(0, BLOCK)
            seen = s < last
            if MASKED:
                seen = seen & (tl.load(mask + row * mask_row + s, mask=seen, other=0) != 0)
            read = seen[:, None] & (d < DIM)[None, :]
            owner, place = tl.zeros_like(s) + row, s
            if PAGE:
                listed = pages + tl.load(spans + row * 3) * pages_row + s // PAGE
                owner, place = tl.load(listed, mask=seen, other=0), s % PAGE
            owner = owner.to(tl.int64)
            at = (owner * k_row + place * k_token)[:, None] + kv_head * k_head + d[None, :]
            keys = tl.load(k + at, mask=read, other=0.0).to(tl.float32)
            score = tl.where(seen, tl.sum(keys * query[None, :], 1), -float("inf"))
            new_highest = tl.maximum(highest, tl.max(score, 0))
            # A part that sees nothing keeps -inf, whose difference from itself would be NaN.
            shift = tl.where(new_highest == -float("inf"), 0.0, new_highest)
            weight = tl.exp(score - shift)
            decay = tl.exp(highest - shift)
            ids = tl.load(token_ids + owner * ids_row + place, mask=seen, other=0)
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
    parts = _empty_parts(q_BHTD, n_bag, n_split)
    seen_BS = None
    if mask is not None:
        seen_BS = mask[:, 0, 0].expand(n_row, -1).to(torch.int8).contiguous()
    k_BKSD = k_BKSD if k_BKSD.stride(3) == 1 else k_BKSD.contiguous()
    ids = token_ids_BS.expand(n_row, -1).contiguous()
    attend_split[(n_bag, n_split)](
        q_BHTD.contiguous(), k_BKSD, ids, table, ids if seen_BS is None else seen_BS, ids, ids,
        *parts,
        k_BKSD.stride(0), k_BKSD.stride(1), k_BKSD.stride(2), n_past, table.stride(0), n_past, 0,
        n_past, per_split, attention_scale(head_dim),
        HEADS=n_head, GROUP=n_head // n_kv_head, DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), BLOCK=BLOCK_S, MASKED=seen_BS is not None, PAGE=0,
    )  # fmt: skip
    return _combined(*parts).view(n_row, n_head, 1, head_dim).to(q_BHTD.dtype)


def attend_pages_fused(
    q_THD: Tensor, pages_NKPD: Tensor, page_ids_NP: Tensor, table: Tensor, spans_T3: Tensor,
    page_table_RM: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """Attention (T, H, D) of the new tokens of R requests, whose past lies in pages of P slots.

    No shape depends on what the tensors hold, so that a CUDA graph can record it. A prompt's tokens
    are read one by one, each with the whole past before it: right, but slow for long prompts.

    Args:
        pages_NKPD: keys, in any order of pages; the last dimension dense.
        page_ids_NP: token ids of their slots, dense.
        spans_T3: int32, from `token_spans`.
        page_table_RM: int32, the pages of each request in the order of its text.
        scale: what products of queries and keys are multiplied by.
    """
    n_token, n_head, head_dim = q_THD.shape
    n_slot, n_bag = pages_NKPD.shape[2], n_token * n_head
    longest = page_table_RM.shape[1] * n_slot
    n_split = max(1, min(-(-PROGRAMS // n_bag), -(-longest // BLOCK_S)))
    parts = _empty_parts(q_THD, n_bag, n_split)
    attend_split[(n_bag, n_split)](
        q_THD.contiguous(), pages_NKPD, page_ids_NP, table, page_ids_NP, spans_T3, page_table_RM,
        *parts,
        *pages_NKPD.stride()[:3], page_ids_NP.stride(0), table.stride(0), 0,
        page_table_RM.stride(0), 0, 0, scale,
        HEADS=n_head, GROUP=n_head // pages_NKPD.shape[1], DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), BLOCK=BLOCK_S, MASKED=False, PAGE=n_slot,
    )  # fmt: skip
    return _combined(*parts).view(n_token, n_head, head_dim).to(q_THD.dtype)


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


def _empty_parts(q: Tensor, n_bag: int, n_split: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what the programs of `attend_split` return: sums of values, maxima, sums."""
    out = q.new_empty(n_bag, n_split, q.shape[-1], dtype=torch.float32)
    return out, *q.new_empty(2, n_bag, n_split, dtype=torch.float32).unbind()


def _combined(out: Tensor, peak: Tensor, total: Tensor) -> Tensor:
    """(bags, D): the attention to the whole past; zero where nothing is seen."""
    smallest = torch.finfo(torch.float32)
    share = (peak - peak.amax(1, keepdim=True).clamp(min=smallest.min)).exp()
    total = (total * share).sum(1).clamp(min=smallest.tiny)
    return (out * share[:, :, None]).sum(1) / total[:, None]
