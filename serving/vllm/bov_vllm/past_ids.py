"""The token id before each new token, exact however vLLM cuts a text into steps.

Two ways: by the slot of the pages in which the token before lies, which works with every runner;
and from the requests' own ids, where vLLM's runner hands these out. Neither has a shape that
depends on data, so that both can be part of a CUDA graph.

Shapes: N new tokens of all requests, R requests, M blocks of a request.
"""

import torch
from torch import Tensor


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


def read_previous(
    ids: Tensor, positions_N: Tensor, starts_R: Tensor, block_table_RM: Tensor, block_size: int
) -> Tensor:
    """(N,): the id before each token, by the slot that it lies in.

    Args:
        ids: by slot.
        positions_N: of the tokens in their texts; what is given for position 0 means nothing.
        starts_R: as in `request_of`.
        block_table_RM: the blocks of each request.
        block_size: slots of a block.
    """
    request = request_of(len(positions_N), starts_R)
    before = (positions_N - 1).clamp(min=0)
    column = (before // block_size).clamp(max=block_table_RM.shape[1] - 1)
    slot = block_table_RM[request, column].long() * block_size + before % block_size
    return ids[slot.clamp(0, len(ids) - 1)]


def previous_of_requests(
    token_ids_N: Tensor, positions_N: Tensor, starts_R: Tensor, rows_R: Tensor, history: Tensor
) -> Tensor:
    """(N,): the same from ``history``, the ids of every request's text by row and position.

    Only a request's first token of a step is looked up there: drafts after it are no history yet.

    Args:
        token_ids_N: the new tokens.
        positions_N: as in `read_previous`, and so is ``starts_R``.
        rows_R: the row of each request.
        history: (rows, positions).
    """
    request = request_of(len(token_ids_N), starts_R)
    token = torch.arange(len(token_ids_N), dtype=starts_R.dtype, device=starts_R.device)
    before = history[rows_R[request], (positions_N - 1).clamp(min=0)]
    return torch.where(token == starts_R[request], before, token_ids_N.roll(1).to(history.dtype))
