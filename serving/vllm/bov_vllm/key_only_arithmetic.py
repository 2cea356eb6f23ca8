"""Attention to pages that hold keys alone, whose values are rows of a table: torch, and no vLLM.

A request's past lies in pages of P slots each, in any order; beside the keys stand the row numbers
of every slot, and the value of a slot is made of these rows of the table. New keys and numbers are
written before this reads them, so that a request's new tokens are the last ones of its past. Within
a page a head's keys are a matrix (D, P), as vLLM's kernel for CPUs wants them.

A few new tokens (decoding, drafts) read the keys where they lie. For many (prefill) keys and values
are written to scratch memory, which all of them share, and go through a kernel for dense attention:
torch's here, vLLM's own in `bov_vllm.key_only`.

Shapes: T new tokens of all requests, n new tokens and S tokens in all of one request, H query
heads, K key-value heads, G = H / K, D head dimension, N pages of P slots, R rows per token. Row
numbers are (N, P) where that is one, with weight 1, or (N, P, R).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bov_lightning.model.decode import of_rows, read_bag, read_summed

FEW_NEW = 8
"""Up to so many new tokens of a request read keys in place."""

PIECE = 2048
"""Tokens whose keys and values lie in the scratch buffers at a time."""


@dataclass
class Request:
    """One request's part of a step."""

    first: int
    """Row of its first new token."""
    n_new: int
    n_token: int
    """Tokens of the past, the new ones included."""
    pages: Tensor
    """(number of pages,) int64, in the order of the text."""
    kept: dict = field(default_factory=dict)
    """What a kernel works out once for all layers of the step."""

    def seen_from(self, window: int | None) -> int:
        """Position of the first token that any of the new ones sees."""
        return 0 if window is None else max(0, self.n_token - self.n_new - window)


def requests_of(
    query_start: list[int], n_tokens: list[int], page_table: Tensor, n_slot: int
) -> list[Request]:
    """The requests of a step that have new tokens.

    ``query_start`` has one entry more than there are requests; ``page_table`` is (requests, pages)
    and may be wider than needed.
    """
    requests = []
    for row, n_token in enumerate(n_tokens):
        first, n_new = query_start[row], query_start[row + 1] - query_start[row]
        if n_new:
            pages = page_table[row, : -(-n_token // n_slot)]
            requests.append(Request(first, n_new, n_token, pages.long()))
    return requests


@dataclass
class Scratch:
    """Memory that is used again and again: fresh memory costs as much time as filling it."""

    kept: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A dense tensor with anything in it."""
        size = torch.Size(shape).numel()
        kept = self.kept.get((name, dtype))
        if kept is None or len(kept) < size:
            kept = self.kept[name, dtype] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)


def write_slots(
    key_TKD: Tensor, row_ids: Tensor | None, slots_T: Tensor, pages_NKPD: Tensor, page_ids: Tensor
) -> None:
    """Puts new keys, and row numbers if given, into their slots; pages may have any strides."""
    page, place = slots_T // pages_NKPD.shape[2], slots_T % pages_NKPD.shape[2]
    pages_NKPD[page, :, place] = key_TKD.to(pages_NKPD.dtype)
    if row_ids is not None:
        page_ids[page, place] = row_ids.to(page_ids.dtype)


def attend_pages(
    q_THD: Tensor, pages_NKDP: Tensor, page_ids: Tensor, table: Tensor, requests: list[Request],
    window: int | None, scale: float, out_THD: Tensor, scratch: Scratch,
    attend_many: Callable | None = None, row_weights: tuple[float, ...] | None = None,
) -> None:  # fmt: skip
    """Writes the attention of all new tokens to ``out_THD``, in its dtype.

    Args:
        pages_NKDP: fp32 or fp16. fp16 holds bf16's keys too, which are normed: exactly, but for
            channels below 6e-5; scores are eight times as precise as bf16's would be.
        page_ids: row numbers of the slots.
        table: (rows, K*D), in the dtype of the queries.
        window: how many tokens to its left each token sees besides itself; None: all.
        scale: what products of queries and keys are multiplied by.
        attend_many: what does it for many new tokens of a request; `attend_in_pieces` if None.
        row_weights: what each of a value's R rows is multiplied by; None: it is one row.
    """
    for request in requests:
        new = slice(request.first, request.first + request.n_new)
        row_ids = page_ids[request.pages].flatten(0, 1)[: request.n_token]
        many = attend_many or attend_in_pieces
        attend = attend_in_place if request.n_new <= FEW_NEW else many
        attend(
            q_THD[new], pages_NKDP, row_ids, table, request, window, scale, out_THD[new], scratch,
            row_weights,
        )  # fmt: skip


def attend_in_place(
    q: Tensor, pages: Tensor, row_ids: Tensor, table: Tensor, request: Request,
    window: int | None, scale: float, out: Tensor, scratch: Scratch,
    row_weights: tuple[float, ...] | None = None,
) -> None:  # fmt: skip
    """`attend_pages` of one request, whose row numbers are given: keys are read where they lie."""
    n_new, n_head, head_dim = q.shape
    _, n_kv_head, _, n_slot = pages.shape
    group = n_head // n_kv_head
    start = request.seen_from(window)
    first_page = start // n_slot
    q_KQD = q.view(n_new, n_kv_head, group, head_dim).transpose(0, 1).flatten(1, 2)
    score = _scores_in_place(q_KQD, pages, request, first_page)
    begin = start - first_page * n_slot
    score_KnGS = score.permute(1, 2, 0, 3).reshape(n_kv_head, n_new, group, -1)
    score_KnGS = score_KnGS[..., begin : begin + request.n_token - start] * scale
    hidden = band_hides(n_new, request.n_token - start, window)
    if hidden is not None:
        score_KnGS.masked_fill_(hidden[:, None], -torch.inf)
    weight_1QS = score_KnGS.softmax(-1).flatten(0, 2)[None]
    weight_1QS, row_ids_1S = of_rows(weight_1QS, row_ids[None, start:], row_weights)
    read = read_bag
    if row_ids_1S.shape[1] > len(table):
        read, row_ids_1S = read_summed, row_ids_1S.long()
    # All queries of a key-value head are one group, whose bags read the same rows one by one.
    y_1Q1D = read(weight_1QS, row_ids_1S, table, n_kv_head)
    out.copy_(y_1Q1D.view(n_kv_head, n_new, group, head_dim).transpose(0, 1).flatten(1, 2))


def _scores_in_place(q_KQD: Tensor, pages: Tensor, request: Request, first_page: int) -> Tensor:
    """(number of pages, K, Q, P) fp32: products of queries and the keys of a request's pages.

    A page's scores are the sum of its channels' rows, each times the query's channel: a bag, which
    is read at the memory's speed, summed in fp32 and rounded to the pages' dtype. A product of so
    few rows would be slower, and of two half-precision matrices no better rounded.
    """
    n_kv_head, n_query, head_dim = q_KQD.shape
    n_slot, numbers = pages.shape[3], request.pages[first_page:]
    channel = request.kept.get((first_page, n_query))
    if channel is None:
        row = numbers[:, None] * n_kv_head + torch.arange(n_kv_head)
        channel = row[:, :, None, None] * head_dim + torch.arange(head_dim)
        channel = channel.expand(-1, -1, n_query, -1).reshape(-1, head_dim).int()
        request.kept[first_page, n_query] = channel
    weight = q_KQD.to(pages.dtype).expand(len(numbers), -1, -1, -1).reshape(-1, head_dim)
    channels = pages.view(-1, n_slot)
    bags = F.embedding_bag(channel, channels, per_sample_weights=weight, mode="sum")
    return bags.float().view(len(numbers), n_kv_head, n_query, n_slot)


def band_hides(n_new: int, n_seen: int, window: int | None) -> Tensor | None:
    """(n_new, n_seen) bool: what the last tokens of a text do not see of its last ones."""
    if n_new == 1 and (window is None or n_seen <= window + 1):
        return None
    distance = torch.arange(n_seen - n_new, n_seen)[:, None] - torch.arange(n_seen)
    hidden = distance < 0
    return hidden if window is None else hidden | (distance > window)


def write_values(
    row_ids: Tensor, table: Tensor, row_weights: tuple[float, ...] | None, out: Tensor,
    scratch: Scratch,
) -> None:  # fmt: skip
    """Writes the values that rows (S,) or (S, R) of a table make to ``out``."""
    if row_weights is None:
        torch.index_select(table, 0, row_ids, out=out)
        return
    more = scratch.take("more rows", out.shape, out.dtype)
    for i, (ids_S, weight) in enumerate(zip(row_ids.unbind(1), row_weights, strict=True)):
        torch.index_select(table, 0, ids_S, out=more if i else out)
        if i:
            out.add_(more, alpha=weight)
        elif weight != 1:
            out.mul_(weight)


def _values(
    row_ids: Tensor, table: Tensor, row_weights: tuple[float, ...] | None, n_kv_head: int,
    scratch: Scratch,
) -> Tensor:  # fmt: skip
    """(K, S, D): the values of these tokens, in scratch memory."""
    values = scratch.take("values", (len(row_ids), table.shape[1]), table.dtype)
    write_values(row_ids, table, row_weights, values, scratch)
    return values.unflatten(1, (n_kv_head, -1)).transpose(0, 1)


def _keys(
    pages: Tensor, request: Request, low: int, high: int, dtype: torch.dtype, scratch: Scratch
) -> Tensor:
    """(K, S, D): the keys of tokens ``low`` to ``high`` of a request, in scratch memory."""
    _, n_kv_head, head_dim, n_slot = pages.shape
    first = low // n_slot
    numbers = request.pages[first : -(-high // n_slot)].tolist()
    keys = scratch.take("keys", (n_kv_head, len(numbers), n_slot, head_dim), dtype)
    for place, page in enumerate(numbers):
        keys[:, place] = pages[page].mT
    return keys.flatten(1, 2)[:, low - first * n_slot : high - first * n_slot]


def attend_in_pieces(
    q: Tensor, pages: Tensor, row_ids: Tensor, table: Tensor, request: Request,
    window: int | None, scale: float, out: Tensor, scratch: Scratch,
    row_weights: tuple[float, ...] | None = None,
) -> None:  # fmt: skip
    """The same for many new tokens, by torch's kernel: a piece of the past at a time."""
    n_kv_head, n_token = pages.shape[1], request.n_token
    before = n_token - request.n_new
    # One key-value head is a row of the batch, so that its query heads share its keys unrepeated.
    q_KGnD = q.unflatten(1, (n_kv_head, -1)).permute(1, 2, 0, 3)

    def part(low: int, high: int, queries: Tensor, **how) -> tuple[Tensor, Tensor]:
        """Attention to tokens ``low`` to ``high``, (K, G, n, D), and log of the sum, (K, G, n)."""
        k_KSD = _keys(pages, request, low, high, q.dtype, scratch)
        v_KSD = _values(row_ids[low:high], table, row_weights, n_kv_head, scratch)
        k, v = (x[:, None].expand(-1, queries.shape[1], -1, -1) for x in (k_KSD, v_KSD))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, k, v, scale=scale, **how
        )

    if window is not None and window < n_token - 1:
        size = max(window // 2, 64)
        for first in range(0, request.n_new, size):
            queries = q_KGnD[:, :, first : first + size]
            high = before + first + queries.shape[2]
            low = max(0, before + first - window)
            hidden = band_hides(queries.shape[2], high - low, window)
            mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
            y, _ = part(low, high, queries, attn_mask=mask)
            out[first : first + size] = y.permute(2, 0, 1, 3).flatten(1, 2)
        return
    y, log_sum = part(before, n_token, q_KGnD, is_causal=True)
    for low, high in _pieces(before):
        other, other_log_sum = part(low, high, q_KGnD)
        share = torch.sigmoid(other_log_sum - log_sum)[..., None].to(y.dtype)
        y = torch.lerp(y, other, share)
        log_sum = torch.logaddexp(log_sum, other_log_sum)
    out.copy_(y.permute(2, 0, 1, 3).flatten(1, 2))


def _pieces(n_token: int) -> Iterator[tuple[int, int]]:
    """Equal stretches of at most `PIECE` tokens."""
    n_piece = -(-n_token // PIECE)
    for i in range(n_piece):
        yield n_token * i // n_piece, n_token * (i + 1) // n_piece
