"""Attention of one new token to a long past: read keys once, and as few values as possible.

With values that are rows of a table, or weighted sums of R of them, attention's output is an
embedding bag over row numbers weighted by the attention probabilities; since equal rows are equal
values, their weights can be summed first, so that no row is read twice however long the past is.

Shapes: B batch, S past tokens (the new one included), H query heads, K key-value heads, D head
dimension, N table rows, R rows per token. Row numbers are (B, S) where that is one, with weight 1,
or (B, S, R).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bov_lightning.model.attention import Mask, attend, attention_scale

KEYS_PER_CHUNK = 512
"""Keys that are converted to fp32 at a time on a CPU: what its cache holds for some 12 heads."""


def probabilities(q_BHTD: Tensor, k_BKSD: Tensor, mask_BTS: Tensor | None) -> Tensor:
    """Softmax over the past of one query per head, (B, H, S) fp32."""
    n_row, n_head, _, head_dim = q_BHTD.shape
    q_BKGD = q_BHTD.reshape(n_row, k_BKSD.shape[1], -1, head_dim)
    score_BKSG = scores(q_BKGD, k_BKSD)
    score_BHS = score_BKSG.mT.reshape(n_row, n_head, -1) * attention_scale(head_dim)
    if mask_BTS is not None:
        score_BHS = score_BHS.masked_fill(~mask_BTS, -torch.inf)
    return score_BHS.softmax(-1)


def scores(q_BKGD: Tensor, k_BKSD: Tensor) -> Tensor:
    """Products of queries and keys in fp32, (B, K, S, G); G query heads per key-value head."""
    # Keys first: for a single query per head this product runs at the memory's speed, the
    # transposed one at a quarter of it.
    if k_BKSD.dtype == torch.float32 or q_BKGD.is_cuda:
        return (k_BKSD @ q_BKGD.to(k_BKSD.dtype).mT).float()
    return _half_scores(q_BKGD, k_BKSD)


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


def sum_rows(rows: Tensor, row_weights: tuple[float, ...] | None) -> Tensor:
    """Values (..., V) of rows (..., R, V), each times its weight; of (..., V) without weights."""
    if row_weights is None:
        return rows
    # One after the other: a product with the weights would be one more copy of all rows.
    first, *others = rows.unbind(-2)
    value = first if row_weights[0] == 1 else row_weights[0] * first
    for row, weight in zip(others, row_weights[1:], strict=True):
        value = value.add(row, alpha=weight)
    return value


def of_rows(
    weight_BHS: Tensor, row_ids: Tensor, row_weights: tuple[float, ...] | None
) -> tuple[Tensor, Tensor]:
    """Weights (B, H, S*R) and numbers (B, S*R) of the rows of which the past's values are made."""
    if row_weights is None:
        return weight_BHS, row_ids
    weight_BHSR = torch.stack([weight * weight_BHS for weight in row_weights], dim=-1)
    return weight_BHSR.flatten(2), row_ids.flatten(1)


def attend_values(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask) -> Tensor:
    """`attend` to kept values, faster for one new token per row on a CPU.

    On CUDA it takes the kernel that is split over the past, which needs no plan for its length.
    """
    if q_BHTD.is_cuda and q_BHTD.shape[2] == 1:
        from bov_lightning.model.kernels import attend_kept, triton

        if triton is not None:
            return attend_kept(q_BHTD, k_BKSD, v_BKSD, mask)
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
    q_BHTD: Tensor, k_BKSD: Tensor, row_ids: Tensor, table: Tensor, mask: Mask,
    row_weights: tuple[float, ...] | None = None,
) -> Tensor:  # fmt: skip
    """The reference, and the way of several new tokens: copies the value of every past token."""
    values = sum_rows(F.embedding(row_ids, table), row_weights)
    v_BKSD = values.unflatten(-1, (k_BKSD.shape[1], -1)).transpose(1, 2).to(q_BHTD.dtype)
    return attend(q_BHTD, k_BKSD.to(q_BHTD.dtype), v_BKSD, mask)


def attend_bag(
    q_BHTD: Tensor, k_BKSD: Tensor, row_ids: Tensor, table: Tensor, mask: Mask,
    row_weights: tuple[float, ...] | None = None,
) -> Tensor:  # fmt: skip
    """One new token per row: an embedding bag over the past tokens."""
    weight_BHS = probabilities(q_BHTD, k_BKSD, None if mask is None else mask[:, 0])
    weight_BHS, row_ids_BS = of_rows(weight_BHS, row_ids, row_weights)
    return read_bag(weight_BHS, row_ids_BS, table, k_BKSD.shape[1]).to(q_BHTD.dtype)


def read_bag(weight_BHS: Tensor, row_ids_BS: Tensor, table: Tensor, n_kv_head: int) -> Tensor:
    """(B, H, 1, D): the rows of the past, each times its weight."""
    group = weight_BHS.shape[1] // n_kv_head
    head = torch.arange(n_kv_head, device=table.device).repeat_interleave(group)
    row_BHS = row_ids_BS[:, None] * n_kv_head + head[:, None]
    return weighted_rows(weight_BHS, row_BHS, table.view(-1, table.shape[1] // n_kv_head))


def attend_summed(
    q_BHTD: Tensor, k_BKSD: Tensor, row_ids: Tensor, table: Tensor, mask: Mask,
    row_weights: tuple[float, ...] | None = None,
) -> Tensor:  # fmt: skip
    """One new token per row: sums the weights of equal rows, then bags the distinct ones."""
    weight_BHS = probabilities(q_BHTD, k_BKSD, None if mask is None else mask[:, 0])
    weight_BHS, row_ids_BS = of_rows(weight_BHS, row_ids, row_weights)
    return read_summed(weight_BHS, row_ids_BS, table, k_BKSD.shape[1]).to(q_BHTD.dtype)


def read_summed(weight_BHS: Tensor, row_ids_BS: Tensor, table: Tensor, n_kv_head: int) -> Tensor:
    """`read_bag` that sums the weights of equal rows first, so as to read each row once."""
    n_head = weight_BHS.shape[1]
    head = torch.arange(n_kv_head, device=table.device).repeat_interleave(n_head // n_kv_head)
    table_ND = table.view(-1, table.shape[1] // n_kv_head)
    rows = []
    for weight_HS, ids_S in zip(weight_BHS, row_ids_BS, strict=True):
        seen_N = torch.zeros(len(table), dtype=torch.bool, device=table.device)
        distinct = seen_N.index_fill_(0, ids_S, True).nonzero()[:, 0]
        summed_HN = weight_HS.new_zeros(n_head, len(table))
        summed_HN.scatter_add_(1, ids_S.expand(n_head, -1), weight_HS)
        row_HN = distinct * n_kv_head + head[:, None]
        rows.append(weighted_rows(summed_HN[None, :, distinct], row_HN[None], table_ND))
    return torch.cat(rows)


def best_way(n_token: int, n_read: int, n_row: int, on_cuda: bool = False) -> Callable:
    """Which of these reads a table: by the number of new tokens and of rows that the past is.

    From about as many as the table has on, so many are equal that summing their weights first saves
    more reads than it costs. On CUDA one kernel does it all, where Triton is installed.
    """
    if n_token > 1:
        return attend_gathered
    if on_cuda:
        from bov_lightning.model.kernels import attend_fused, triton

        if triton is not None:
            return attend_fused
    return attend_summed if n_read > n_row else attend_bag


def attend_bank(
    q_BHTD: Tensor, k_BKSD: Tensor, row_ids: Tensor, table: Tensor, mask: Mask,
    row_weights: tuple[float, ...] | None = None,
) -> Tensor:  # fmt: skip
    """Attention (B, H, T, D) to a past whose values are made of rows of ``table`` (N, K*D).

    ``row_weights``: what each of a value's R rows is multiplied by; None: it is one row.
    """
    n_read = k_BKSD.shape[2] * len(row_weights or (1.0,))
    way = best_way(q_BHTD.shape[2], n_read, len(table), q_BHTD.is_cuda)
    return way(q_BHTD, k_BKSD, row_ids, table, mask, row_weights)
