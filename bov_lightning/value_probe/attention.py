"""Attention computed so that it tells how much of it each value gets.

Whatever calls `torch.nn.functional.scaled_dot_product_attention` gets its output from here,
computed a few queries at a time. Calibration takes half the time that it takes with a derivative
by the values, which says the same and needs nothing of the way in which a model attends.

Shapes: B rows, T queries, S keys, H query heads, K key heads, D channels.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

N_QUERY = 64
"""Queries computed together: their probabilities stay in a core's cache."""


class Attending(TorchFunctionMode):
    """While it is entered, ``see`` is given the attention that each key gets.

    Args:
        see: takes (B, S, H), summed over queries, in the dtype that it was computed in.
    """

    def __init__(self, see: Callable[[Tensor], None]):
        super().__init__()
        self.see = see

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        """Replaces one function, and calls all others."""
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        out, mass_BSH = attention(*args, **(kwargs or {}))
        self.see(mass_BSH)
        return out


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, H, T, D) as `torch.nn.functional.scaled_dot_product_attention` gives it, with its
    arguments, and what each key gets of each head: (B, S, H), summed over queries."""
    n_row, n_head, n_query, n_channel = query.shape
    n_key = key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(n_row, n_head, n_query, value.shape[-1])
    mass_BHS = torch.zeros(n_row, n_head, n_key, dtype=dtype, device=query.device)
    scale = n_channel**-0.5 if scale is None else scale
    future = torch.ones(N_QUERY, N_QUERY, dtype=torch.bool, device=query.device).triu_(1)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(n_row, n_head, n_query, n_key)
    for row in range(n_row):
        queries = query[row].to(dtype) * scale
        keys, values = (
            x[row].to(dtype).repeat_interleave(n_head // x.shape[1], dim=0) for x in (key, value)
        )
        for first in range(0, n_query, N_QUERY):
            part = slice(first, min(first + N_QUERY, n_query))
            n_seen = part.stop if is_causal else n_key
            scores = torch.bmm(queries[:, part], keys[:, :n_seen].transpose(1, 2))
            if is_causal:
                n = part.stop - first
                scores[:, :, first:].masked_fill_(future[:n, :n], -torch.inf)
            elif attn_mask is not None and attn_mask.dtype == torch.bool:
                scores.masked_fill_(~attn_mask[row, :, part], -torch.inf)
            elif attn_mask is not None:
                scores += attn_mask[row, :, part]
            shares = scores.softmax(-1)
            mass_BHS[row, :, :n_seen] += shares.sum(1)
            out[row, :, part] = torch.bmm(shares, values[:, :n_seen])
    return out, mass_BHS.transpose(1, 2)
