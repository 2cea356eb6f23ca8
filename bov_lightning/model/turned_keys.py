"""Attention to a past whose values are its keys before rotation: one cache in the place of two.

A key at position p is kept as if it stood at p mod C, with C = `TURN`: R(p mod C) k, where R is the
rotation of rotary embeddings. Attention needs both R(p) k, which is R(p - p mod C) times what is
kept, and the value k, which is R(-(p mod C)) times it.

For one new token no key is turned at all. A block of C keys lacks one rotation, so the query is
turned back by it, once per block: q . R(bC) k = R(-bC) q . k. And of the weighted sum of values,
what stands at the same p mod C is summed up first, and these C sums are turned.

Shapes: B batch, T new tokens, S past tokens (the new ones included), H query heads, K key-value
heads, G = H / K, D head dimension, N blocks, C keys of a block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bov_lightning.model.attention import (
    Mask,
    attend,
    attention_scale,
    rotary_angles_at,
    rotate,
)
from bov_lightning.model.decode import KEYS_PER_CHUNK, rows_of, weighted_rows

TURN = 128
"""Keys of a block, of which `KEYS_PER_CHUNK` is a multiple."""


def turn_to_keep(key_BTKD: Tensor, positions: Tensor) -> Tensor:
    """Normed keys of tokens at ``positions`` (1 or B, T), as `attend_keys` finds them kept."""
    return rotate(key_BTKD, *rotary_angles_at(positions % TURN, key_BTKD.shape[3]))


def attend_keys(
    q_BHTD: Tensor, kept_BKSD: Tensor, positions: Tensor, mask: Mask, in_order: bool
) -> Tensor:
    """Attention (B, H, T, D) to kept keys whose values are these keys, unrotated.

    Args:
        q_BHTD: rotated and normed.
        kept_BKSD: what `turn_to_keep` made of the keys.
        positions: (1 or B, S), where the keys stand.
        mask: as for `attend`.
        in_order: whether the key in place s stands at position s.
    """
    if in_order and q_BHTD.shape[2] == 1 and not q_BHTD.is_cuda:
        found = rows_of(kept_BKSD)
        if found is not None:
            return _attend_in_order(q_BHTD, kept_BKSD, mask, *found)
    within = positions % TURN
    kept_BSKD = kept_BKSD.transpose(1, 2).to(q_BHTD.dtype)
    k_BSKD, v_BSKD = (
        rotate(kept_BSKD, *rotary_angles_at(by, q_BHTD.shape[3]))
        for by in (positions - within, -within)
    )
    return attend(q_BHTD, k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2), mask)


def _attend_in_order(
    q_BHTD: Tensor, kept_BKSD: Tensor, mask: Mask, table: Tensor, row_BKS: Tensor
) -> Tensor:
    """Of one new token; ``table`` and ``row_BKS`` are the keys as `rows_of` gives them."""
    n_head, head_dim = q_BHTD.shape[1], q_BHTD.shape[3]
    n_kv_head, n_past = kept_BKSD.shape[1:3]
    score_BHS = _scores(q_BHTD, kept_BKSD) * attention_scale(head_dim)
    if mask is not None:
        score_BHS = score_BHS.masked_fill(~mask[:, 0], -torch.inf)
    # A last block that is not full is filled with the last key, at no weight.
    lacking = -n_past % TURN
    weight_BHS = F.pad(score_BHS.softmax(-1), (0, lacking))
    row_BKS = torch.cat((row_BKS, row_BKS[..., -1:].expand(-1, -1, lacking)), dim=-1)
    row_BHS = row_BKS.repeat_interleave(n_head // n_kv_head, dim=1)

    def by_place(x_BHS: Tensor) -> Tensor:
        """(B, H * C, N)."""
        return x_BHS.unflatten(-1, (-1, TURN)).mT.flatten(1, 2)

    sums = weighted_rows(by_place(weight_BHS), by_place(row_BHS), table).float()
    sum_RCHD = sums[:, :, 0].unflatten(1, (n_head, TURN)).transpose(1, 2)
    back = rotary_angles_at(-torch.arange(TURN), head_dim)
    y_BHD = rotate(sum_RCHD, *back).sum(1)
    return y_BHD[:, :, None].to(q_BHTD.dtype)


def _scores(q_BHTD: Tensor, kept_BKSD: Tensor) -> Tensor:
    """Products (B, H, S), in fp32, of one query per head and the keys in their places."""
    n_row, n_kv_head, n_past, head_dim = kept_BKSD.shape
    n_block = -(-n_past // TURN)
    lacks = rotary_angles_at(-TURN * torch.arange(n_block), head_dim)
    q_BNHD = rotate(q_BHTD.transpose(1, 2).float().expand(-1, n_block, -1, -1), *lacks)
    q_BKNDG = q_BNHD.unflatten(2, (n_kv_head, -1)).permute(0, 2, 1, 4, 3)
    score = q_BKNDG.new_empty(n_row, n_kv_head, n_block * TURN, q_BKNDG.shape[4])
    scratch = q_BKNDG.new_zeros(n_row, n_kv_head, min(KEYS_PER_CHUNK, n_block * TURN), head_dim)
    for first in range(0, n_past, KEYS_PER_CHUNK):
        keys = kept_BKSD[:, :, first : first + KEYS_PER_CHUNK]
        size = -(-keys.shape[2] // TURN) * TURN
        scratch[:, :, : keys.shape[2]].copy_(keys)
        blocks = slice(first // TURN, (first + size) // TURN)
        products = scratch[:, :, :size].unflatten(2, (-1, TURN)) @ q_BKNDG[:, :, blocks]
        score[:, :, first : first + size] = products.flatten(2, 3)
    return score[:, :, :n_past].mT.flatten(1, 2)
