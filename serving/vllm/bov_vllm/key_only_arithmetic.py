"""Attention to pages that hold keys alone, whose values are rows of a table: torch, and no vLLM.

A request's past lies in pages of P slots each, in any order; beside the keys stand the row numbers
of every slot, and the value of a slot is made of these rows of the table. New keys and numbers are
written before this reads them, so that a request's new tokens are the last ones of its past. Within
a page a head's keys are a matrix (D, P), as vLLM's kernel for CPUs wants them.

One new token (decoding) and a few (drafts) read keys and rows where they lie. Up to some hundred
read the keys where they lie too, sum the weights of equal rows, and read each row once. For more
(prefill), or where few rows are equal, keys and values are written to scratch memory, which all of
them share, and go through a kernel for dense attention: torch's here, vLLM's own in
`bov_vllm.key_only`.

Shapes: T new tokens of all requests, n new tokens and S tokens in all of one request, H query
heads, K key-value heads, G = H / K, Q = n * G queries of a key-value head, D head dimension, N
pages of P slots, R rows per token, U distinct rows. Row numbers are (N, P) where a token has one,
with weight 1, or (N, P, R).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bov_lightning.model.decode import of_rows, read_bag, read_summed

FEW_NEW = 8
"""Up to so many new tokens of a request read every row where it lies."""

SOME_NEW = 64, 256
"""Up to so many read each distinct row once: where a quarter of the rows, or half of them, is one
that the text has had before."""

SCORES = 1 << 22
"""Scores that lie in scratch memory at a time: so many fit a processor's cache."""

SAFE = 2.0**60
"""Sums of weights below it, and above one over it, are far from the ends of fp32."""

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
        if request.n_new == 1:
            attend = attend_one
        elif request.n_new <= FEW_NEW:
            attend = attend_few
        elif sums_pay(request, row_ids, window, row_weights):
            attend = attend_by_sums
        else:
            attend = attend_many or attend_in_pieces
        attend(
            q_THD[new], pages_NKDP, row_ids, table, request, window, scale, out_THD[new], scratch,
            row_weights,
        )  # fmt: skip


def attend_one(
    q: Tensor, pages: Tensor, row_ids: Tensor, table: Tensor, request: Request,
    window: int | None, scale: float, out: Tensor, scratch: Scratch,
    row_weights: tuple[float, ...] | None = None,
) -> None:  # fmt: skip
    """`attend_pages` of a request's only new token, its row numbers given."""
    _, n_head, _ = q.shape
    _, n_kv_head, _, n_slot = pages.shape
    start = request.seen_from(window)
    first_page = start // n_slot
    score_NKGP = _scores_in_place(_by_kv_head(q, n_kv_head), pages, request, first_page)
    begin = start - first_page * n_slot
    score_HS = score_NKGP.permute(1, 2, 0, 3).reshape(n_head, -1)
    score_HS = score_HS[:, begin : begin + request.n_token - start] * scale
    weight_1HS, row_ids_1S = of_rows(score_HS.softmax(-1)[None], row_ids[None, start:], row_weights)
    read = read_bag
    if row_ids_1S.shape[1] > len(table):
        read, row_ids_1S = read_summed, row_ids_1S.long()
    out.copy_(read(weight_1HS, row_ids_1S, table, n_kv_head).view_as(out))


def attend_few(
    q: Tensor, pages: Tensor, row_ids: Tensor, table: Tensor, request: Request,
    window: int | None, scale: float, out: Tensor, scratch: Scratch,
    row_weights: tuple[float, ...] | None = None,
) -> None:  # fmt: skip
    """The same for a few: page by page, so that all queries find its rows in the cache."""
    n_kv_head, n_slot = pages.shape[1], pages.shape[3]
    q_KQD = _by_kv_head(q, n_kv_head)
    n_query, head_dim = q_KQD.shape[1:]
    first_page = request.seen_from(window) // n_slot
    n_page = len(request.pages) - first_page
    score_NKQP = _scores_in_place(q_KQD, pages, request, first_page).mul_(scale * math.log2(math.e))
    first_cut, hidden_NQP = _hidden_in_pages(request, n_slot, n_query, window)
    score_NKQP[first_cut:].masked_fill_(hidden_NQP[:, None], -torch.inf)
    weight_NKQP = score_NKQP.sub_(score_NKQP.amax(-1, keepdim=True).amax(0)).exp2_()
    total_KQ = weight_NKQP.sum((0, -1))
    rows = request.kept.get(("rows of pages", window))
    if rows is None:
        ids = row_ids[first_page * n_slot :]
        # Slots that hold no token have weight 0, and row 0.
        none_each = (0, 0) * (ids.dim() - 1)
        ids = F.pad(ids, (*none_each, 0, n_page * n_slot - len(ids))).view(n_page, 1, 1, -1)
        rows = ids * n_kv_head + torch.arange(n_kv_head).view(-1, 1, 1)
        rows = rows.expand(-1, -1, n_query, -1).flatten(0, 2).int()
        request.kept["rows of pages", window] = rows
    if row_weights is not None:
        weight_NKQP = torch.stack([weight * weight_NKQP for weight in row_weights], dim=-1)
    bags = F.embedding_bag(
        rows, table.view(-1, head_dim), mode="sum",
        per_sample_weights=weight_NKQP.reshape(len(rows), -1).to(table.dtype),
    )  # fmt: skip
    y_KQD = bags.view(n_page, n_kv_head, n_query, head_dim).sum(0, dtype=torch.float32)
    _write(y_KQD.div_(total_KQ[..., None]), out)


def attend_by_sums(
    q: Tensor, pages: Tensor, row_ids: Tensor, table: Tensor, request: Request,
    window: int | None, scale: float, out: Tensor, scratch: Scratch,
    row_weights: tuple[float, ...] | None = None,
) -> None:  # fmt: skip
    """The same for some hundred: the weights of equal rows are summed, in fp32 as all else is.

    Keys are read page by page; a few heads at a time, so that their scores stay in the cache.
    """
    n_kv_head, head_dim, n_slot = pages.shape[1:]
    q_KQD = _by_kv_head(q, n_kv_head)
    n_query = q_KQD.shape[1]
    first_page = request.seen_from(window) // n_slot
    numbers = request.pages[first_page:].tolist()
    n_page = len(numbers)
    n_at_once = max(1, SCORES // (n_page * n_slot * n_query))
    while n_kv_head % n_at_once:
        n_at_once -= 1
    rows = _distinct_rows(request, row_ids, window, row_weights)
    bags = request.kept.get(("bags", window))
    if bags is None:
        place = rows.token + request.seen_from(window) - first_page * n_slot
        heads = torch.arange(n_at_once)[:, None]
        slots = (place // n_slot * n_at_once + heads) * n_slot + place % n_slot
        starts = rows.starts + heads * len(place)
        weights = None if rows.weights is None else rows.weights.repeat(n_at_once)
        bags = request.kept["bags", window] = slots.flatten().int(), starts.flatten().int(), weights
    slots, starts, weights = bags
    first_cut, hidden_NQP = _hidden_in_pages(request, n_slot, n_query, window)
    values_UV = _in_fp32(table, rows.distinct, scratch)
    values_KUD = values_UV.unflatten(1, (n_kv_head, head_dim)).transpose(0, 1)
    # Scores are powers of two, which are quicker than those of e.
    q_KDQ = q_KQD.float().mul(scale * math.log2(math.e)).mT.contiguous()
    score_NKPQ = scratch.take("scores", (n_page, n_at_once, n_slot, n_query), torch.float32)
    exact_KDP = scratch.take("exact", (n_at_once, head_dim, n_slot), torch.float32)
    y_KQD = scratch.take("sums", q_KQD.shape, torch.float32)

    def summed_weights(heads: slice, below_0: bool) -> tuple[Tensor, Tensor]:
        """Weights of distinct rows, (K, U, Q), and what all of a query's are together, (K, Q)."""
        for score_KPQ, number in zip(score_NKPQ, numbers, strict=True):
            keys_KDP = pages[number, heads]
            if keys_KDP.dtype != torch.float32:
                keys_KDP = exact_KDP.copy_(keys_KDP)
            torch.bmm(keys_KDP.mT, q_KDQ[heads], out=score_KPQ)
        score_NKPQ[first_cut:].masked_fill_(hidden_NQP.mT[:, None], -torch.inf)
        if below_0:
            score_NKPQ.sub_(score_NKPQ.amax(2, keepdim=True).amax(0))
        weight_NKPQ = score_NKPQ.exp2_()
        summed_KUQ = F.embedding_bag(
            slots, weight_NKPQ.view(-1, n_query), starts, mode="sum", per_sample_weights=weights
        ).view(n_at_once, -1, n_query)
        # Where rows have weights, their sums are no longer those of the tokens.
        return summed_KUQ, summed_KUQ.sum(1) if weights is None else weight_NKPQ.sum(2).sum(0)

    for low in range(0, n_kv_head, n_at_once):
        heads = slice(low, low + n_at_once)
        summed_KUQ, total_KQ = summed_weights(heads, below_0=False)
        least, most = total_KQ.aminmax()
        # With normed queries and keys it never is, which saves two passes over all scores.
        if not 1 / SAFE < least <= most < SAFE:
            summed_KUQ, total_KQ = summed_weights(heads, below_0=True)
        torch.bmm(summed_KUQ.mT, values_KUD[heads], out=y_KQD[heads])
        y_KQD[heads].div_(total_KQ[..., None])
    _write(y_KQD, out)


@dataclass
class DistinctRows:
    """The rows that a text's values are made of, each once."""

    distinct: Tensor
    """(U,) int64: their numbers."""
    token: Tensor
    """(S*R,) int64: the tokens, counted from the first seen one, sorted by their row."""
    starts: Tensor
    """(U,) int64: where a row's tokens start."""
    weights: Tensor | None
    """(S*R,) fp32: what each of these is multiplied by; None: 1."""


def _distinct_rows(
    request: Request, row_ids: Tensor, window: int | None, row_weights: tuple[float, ...] | None
) -> DistinctRows:
    """Worked out once for all layers of a step."""
    found = request.kept.get(("distinct", window))
    if found is None:
        ids = row_ids[request.seen_from(window) :].flatten().long()
        n_row = 1 if row_weights is None else len(row_weights)
        order = ids.argsort()
        distinct, counts = ids[order].unique_consecutive(return_counts=True)
        weights = None if row_weights is None else torch.tensor(row_weights)[order % n_row]
        found = DistinctRows(distinct, order // n_row, counts.cumsum(0) - counts, weights)
        request.kept["distinct", window] = found
    return found


def sums_pay(
    request: Request, row_ids: Tensor, window: int | None, row_weights: tuple[float, ...] | None
) -> bool:
    """Whether `attend_by_sums` is the fastest way of a request."""
    if request.n_new > max(SOME_NEW):
        return False
    share = 0.75 if request.n_new <= min(SOME_NEW) else 0.5
    n_seen = request.n_token - request.seen_from(window)
    return len(_distinct_rows(request, row_ids, window, row_weights).distinct) <= share * n_seen


def _hidden_in_pages(
    request: Request, n_slot: int, n_query: int, window: int | None
) -> tuple[int, Tensor]:
    """Which slots of its pages each query does not see, (N, Q, P) bool, from that page on.

    It is the same for all layers of a step with this window. Pages are counted from the first one
    that any new token sees; those before the page that is returned are seen by all.
    """
    kept = request.kept.get(("hidden", window))
    if kept is None:
        first_page = request.seen_from(window) // n_slot
        end = request.n_token - first_page * n_slot
        first_cut = (end - request.n_new) // n_slot if window is None else 0
        slot = torch.arange(first_cut * n_slot, (len(request.pages) - first_page) * n_slot)
        query = torch.arange(end - request.n_new, end).repeat_interleave(n_query // request.n_new)
        distance_QS = query[:, None] - slot
        hidden_QS = distance_QS < 0
        if window is not None:
            hidden_QS |= distance_QS > window
        hidden_NQP = hidden_QS.unflatten(1, (-1, n_slot)).transpose(0, 1)
        kept = request.kept["hidden", window] = first_cut, hidden_NQP.contiguous()
    return kept


def _by_kv_head(q: Tensor, n_kv_head: int) -> Tensor:
    """(K, Q, D): the queries (n, H, D) of each key-value head."""
    return q.unflatten(1, (n_kv_head, -1)).transpose(0, 1).flatten(1, 2)


def _write(y_KQD: Tensor, out: Tensor) -> None:
    """The opposite, into (n, H, D)."""
    out.unflatten(1, (len(y_KQD), -1)).copy_(y_KQD.unflatten(1, (len(out), -1)).transpose(0, 1))


def _in_fp32(table: Tensor, rows: Tensor, scratch: Scratch) -> Tensor:
    """(U, K*D) fp32: these rows, in scratch memory."""
    shape = len(rows), table.shape[1]
    found = scratch.take("values", shape, table.dtype)
    torch.index_select(table, 0, rows, out=found)
    if table.dtype == torch.float32:
        return found
    return scratch.take("values", shape, torch.float32).copy_(found)


def _scores_in_place(q_KQD: Tensor, pages: Tensor, request: Request, first_page: int) -> Tensor:
    """(N, K, Q, P) fp32: products of queries and the keys of a request's pages.

    A page's scores are the sum of its channels' rows, each times the query's channel: a bag, which
    is read at the memory's speed, summed in fp32 and rounded to the pages' dtype. A product of so
    few rows would be slower, and of two half-precision matrices no better rounded.
    """
    n_kv_head, n_query, head_dim = q_KQD.shape
    n_slot, numbers = pages.shape[3], request.pages[first_page:]
    channel = request.kept.get(("channels", first_page))
    if channel is None:
        row = numbers[:, None] * n_kv_head + torch.arange(n_kv_head)
        channel = row[:, :, None, None] * head_dim + torch.arange(head_dim)
        channel = channel.expand(-1, -1, n_query, -1).reshape(-1, head_dim).int()
        request.kept["channels", first_page] = channel
    weight = q_KQD.to(pages.dtype).expand(len(numbers), -1, -1, -1).reshape(-1, head_dim)
    channels = pages.view(-1, n_slot)
    bags = F.embedding_bag(channel, channels, per_sample_weights=weight, mode="sum")
    return bags.float().view(len(numbers), n_kv_head, n_query, n_slot)


def band_hides(n_new: int, n_seen: int, window: int | None) -> Tensor:
    """(n_new, n_seen) bool: what the last tokens of a text do not see of its last ones."""
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
