"""Long prompts in chunks."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bov_lightning.model.cache import Cache
from bov_lightning.model.offload import moved

if TYPE_CHECKING:
    from bov_lightning.model.transformer import Transformer

PREFILL_CHUNK = 512
"""New tokens that a row feeds at a time in `prefill`."""


def prefill(
    model: "Transformer", cache: Cache, token_ids_BT: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """Feeds new tokens in chunks; the logits (B, vocab_size) after each row's last one.

    ``lengths`` as in `Transformer.forward`; at least 1 everywhere.
    """
    n_row, n_token = token_ids_BT.shape
    lengths = torch.full((n_row,), n_token) if lengths is None else lengths.cpu()
    logits_BV = None
    for first in range(0, max(n_token, 1), PREFILL_CHUNK):
        chunk = token_ids_BT[:, first : first + PREFILL_CHUNK]
        new = (lengths - first).clamp(0, chunk.shape[1])
        last = (lengths - first - 1).clamp(0, max(chunk.shape[1] - 1, 0))
        whole = n_token and int(new.min()) == chunk.shape[1]
        found = model(
            chunk, cache=cache, lengths=None if whole else new,
            positions_BP=moved(last[:, None], chunk.device),
        )[:, 0]  # fmt: skip
        if logits_BV is None:
            logits_BV = found
        else:
            logits_BV = torch.where(moved((new > 0)[:, None], chunk.device), found, logits_BV)
    return logits_BV
