"""The token ids before each new token, exact however vLLM cuts a text into steps.

Two ways: by the slot of the pages in which the token before lies, which works with every runner;
and from the requests' own ids, where vLLM's runner hands these out. Neither has a shape that
depends on data, so that both can be part of a CUDA graph.

Shapes: N new tokens of all requests, n ids before each, the nearest first, R requests, M blocks of
a request.
"""

import torch
from torch import Tensor

from bov_lightning.model.ngrams import NOTHING


def write_ids(ids: Tensor, slots_N: Tensor, token_ids_N: Tensor) -> None:
    """Puts new ids into their slots; padding, whose slot is negative, into the last one."""
    ids[torch.where(slots_N < 0, len(ids) - 1, slots_N)] = token_ids_N.to(ids.dtype)


def request_of(n_token: int, starts_R: Tensor) -> Tensor:
    """(N,): which request each token belongs to; padding counts for the last one.

    ``starts_R`` (R + 1,): where each request's tokens start, and the last one's end.
    """
    token = torch.arange(n_token, dtype=starts_R.dtype, device=starts_R.device)
    request = torch.searchsorted(starts_R, token, right=True) - 1
    return request.clamp(0, len(starts_R) - 2)


def _places_before(positions_N: Tensor, n: int) -> Tensor:
    """(N, n): the positions before each one, negative beyond the text's start."""
    back = torch.arange(1, n + 1, dtype=positions_N.dtype, device=positions_N.device)
    return positions_N[:, None] - back


def read_previous(
    ids: Tensor, positions_N: Tensor, starts_R: Tensor, block_table_RM: Tensor, block_size: int,
    n: int,
) -> Tensor:  # fmt: skip
    """(N, n): the ids before each token, by the slots that they lie in; `NOTHING` beyond its text.

    Args:
        ids: by slot.
        positions_N: of the tokens in their texts.
        starts_R: as in `request_of`.
        block_table_RM: the blocks of each request.
        block_size: slots of a block.
        n: how many ids.
    """
    request = request_of(len(positions_N), starts_R)[:, None]
    places = _places_before(positions_N, n)
    before = places.clamp(min=0)
    column = (before // block_size).clamp(max=block_table_RM.shape[1] - 1)
    slot = block_table_RM[request, column].long() * block_size + before % block_size
    return ids[slot.clamp(0, len(ids) - 1)].masked_fill(places < 0, NOTHING)


def previous_of_requests(
    token_ids_N: Tensor, positions_N: Tensor, starts_R: Tensor, rows_R: Tensor, history: Tensor,
    n: int,
) -> Tensor:  # fmt: skip
    """(N, n): the same from ``history``, the ids of every request's text by row and position.

    Only what stands before a step is looked up there: its drafts are no history yet.

    Args:
        token_ids_N: the new tokens.
        positions_N: as in `read_previous`, and so is ``starts_R``.
        rows_R: the row of each request.
        history: (rows, positions).
    """
    request = request_of(len(token_ids_N), starts_R)
    token = torch.arange(len(token_ids_N), dtype=starts_R.dtype, device=starts_R.device)
    places = _places_before(positions_N, n)
    before = history[rows_R[request][:, None], places.clamp(min=0)]
    new = torch.stack([token_ids_N.roll(back) for back in range(1, n + 1)], dim=1)
    is_new = _places_before(token, n) >= starts_R[request][:, None]
    return torch.where(is_new, new.to(history.dtype), before).masked_fill(places < 0, NOTHING)
