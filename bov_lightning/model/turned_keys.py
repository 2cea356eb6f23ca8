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
from torch import Tensor

from bov_lightning.model.attention import (
    Mask,
    attend,
    attention_scale,
    rotary_angles_at,
    rotate,
)

TURN = 128
"""Keys of a block: as many turns are left for the sums as 16,384 keys leave for the query."""


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
        return _attend_in_order(q_BHTD, kept_BKSD, mask)
    within = positions % TURN
    kept_BSKD = kept_BKSD.transpose(1, 2).to(q_BHTD.dtype)
    k_BSKD, v_BSKD = (
        rotate(kept_BSKD, *rotary_angles_at(by, q_BHTD.shape[3]))
        for by in (positions - within, -within)
    )
    return attend(q_BHTD, k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2), mask)


def _attend_in_order(q_BHTD: Tensor, kept_BKSD: Tensor, mask: Mask) -> Tensor:
    """Of one new token; block by block, so that what is kept is read in order, and converted in
    the processor's cache."""
    n_row, n_kv_head, n_past, head_dim = kept_BKSD.shape
    blocks = kept_BKSD.split(TURN, dim=2)
    lacks = rotary_angles_at(-TURN * torch.arange(len(blocks)), head_dim)
    q_BNHD = rotate(q_BHTD.transpose(1, 2).float().expand(-1, len(blocks), -1, -1), *lacks)
    q_BKNDG = q_BNHD.unflatten(2, (n_kv_head, -1)).permute(0, 2, 1, 4, 3)
    score_BKSG = q_BKNDG.new_empty(n_row, n_kv_head, n_past, q_BKNDG.shape[4])
    for n, (keys_BKCD, score_BKCG) in enumerate(
        zip(blocks, score_BKSG.split(TURN, dim=2), strict=True)
    ):
        score_BKCG.copy_(keys_BKCD.float() @ q_BKNDG[:, :, n])
    score_BKGS = score_BKSG.mT * attention_scale(head_dim)
    if mask is not None:
        score_BKGS = score_BKGS.masked_fill(~mask, -torch.inf)
    weight_BKGS = score_BKGS.softmax(-1)

    shape = (*weight_BKGS.shape[:3], min(TURN, n_past), head_dim)
    sum_BKGCD = weight_BKGS.new_zeros(shape)
    for keys_BKCD, weight_BKGC in zip(blocks, weight_BKGS.split(TURN, dim=3), strict=True):
        sums = sum_BKGCD[:, :, :, : keys_BKCD.shape[2]]
        sums.addcmul_(keys_BKCD.float()[:, :, None], weight_BKGC[..., None])
    sum_BCHD = sum_BKGCD.flatten(1, 2).transpose(1, 2)
    back = rotary_angles_at(-torch.arange(shape[3]), head_dim)
    return rotate(sum_BCHD, *back).sum(1)[:, :, None].to(q_BHTD.dtype)
