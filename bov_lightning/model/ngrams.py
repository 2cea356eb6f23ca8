"""What a token's values may know of the text: the ids of the token and of those just before it.

Made once for all layers, and cut where a row or a document begins, so that no value source can see
what attention does not.

Shapes: B batch, T time, N = 1 + reach ids, the token's own first.
"""

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from bov_lightning.model.config import TransformerConfig

NOTHING = -1
"""In the place of ids before the first one of a row or of a document."""

NO_KEY = 2**63 - 1
"""What no n-gram's key is, but one of 2^64; the largest of them all."""


class Lookup(Protocol):
    """Of a `ValueSource`, what is asked before the first layer runs."""

    reach: int

    def row_ids(self, ngrams: Tensor, positions: Tensor) -> Tensor:
        """See `ValueSource.row_ids`."""


class Tokens(NamedTuple):
    """The tokens of a forward pass as value sources see them."""

    ids: Tensor
    """(B, T), int64."""
    ngrams: Tensor
    """(B, T, N), int64: each token's own id, then that of the one before and so on; `NOTHING`
    beyond the start of its row or document."""
    row_ids: Tensor
    """(B, T) or (B, T, R), int64: the rows of a table that the token's value is made of."""


def lookup_source(config: "TransformerConfig", blocks: "nn.ModuleList") -> Lookup:
    """The value source whose `Lookup` holds for all layers: the first target layer's."""
    return blocks[config.target_layers[0]].attention.value.source


def look_up(
    source: Lookup, ids_BT: Tensor, positions: Tensor, starts_BT: Tensor | None,
    before_BR: Tensor | None = None, document_start: int | None = None,
) -> Tokens:  # fmt: skip
    """The tokens with what `source` reads of them.

    Args:
        source: see `lookup_source`.
        ids_BT: the tokens.
        positions: (B or 1, T): how many tokens of its row or document stand before each.
        starts_BT: bool, True at tokens that begin a document; None: there are none.
        before_BR: the ``source.reach`` ids before them, in the order of the text; None: there are
            none.
        document_start: which of ``before_BR`` began a document.
    """
    ngrams = ids_BT[..., None]
    if source.reach:
        if before_BR is None:
            ids_BS = F.pad(ids_BT, (source.reach, 0), value=NOTHING)
            starts_BS = None if starts_BT is None else F.pad(starts_BT, (source.reach, 0))
        else:
            ids_BS = torch.cat((before_BR, ids_BT), dim=1)
            starts_BS = None if starts_BT is None else ids_BS == document_start
        ngrams = _ngrams(ids_BS, source.reach, starts_BS)
    return Tokens(ids_BT, ngrams, source.row_ids(ngrams, positions))


def rows_per_token(source: Lookup, device: torch.device | str) -> tuple[int, ...]:
    """The shape of one token's `Tokens.row_ids`: (), or (R,)."""
    ids_11N = torch.zeros(1, 1, 1 + source.reach, dtype=torch.int64, device=device)
    return tuple(source.row_ids(ids_11N, ids_11N[..., 0]).shape[2:])


def _ngrams(ids_BS: Tensor, reach: int, starts_BS: Tensor | None) -> Tensor:
    """(B, S - reach, 1 + reach): of all but the first ``reach`` tokens."""
    n_token = ids_BS.shape[1] - reach
    found, cut = [ids_BS[:, reach:]], None
    for first in reversed(range(reach)):
        ids = ids_BS[:, first : first + n_token]
        if starts_BS is not None:
            # A document's first token sees none before it; those after it see that one.
            begun = starts_BS[:, first + 1 : first + 1 + n_token]
            cut = begun if cut is None else cut | begun
            ids = ids.masked_fill(cut, NOTHING)
        found.append(ids)
    return torch.stack(found, dim=-1)


def text_positions(positions: Tensor, starts_BT: Tensor, count_B: Tensor | None = None) -> Tensor:
    """(B, T): how many tokens of its document stand before each.

    Args:
        positions: (1 or B, T), counted from anywhere.
        starts_BT: bool, True at tokens that begin a document.
        count_B: tokens of the document so far, before the first one here; None: it begins here.
    """
    positions = positions.expand(starts_BT.shape)
    first_B1 = positions[:, :1] if count_B is None else positions[:, :1] - count_B[:, None]
    return positions - torch.where(starts_BT, positions, first_B1).cummax(dim=1).values


def ngram_keys(ngrams: Tensor) -> Tensor:
    """(..., N - 1), int64: a hash of each bigram, trigram and so on of n-grams (..., N).

    Of 64 bits, so that two n-grams practically never have the same one, and the same on every
    device. `NOTHING` counts as an id.
    """
    keys = [_mix(ngrams[..., 0])]
    for ids in ngrams[..., 1:].unbind(-1):
        keys.append(_mix(keys[-1] ^ ids))
    return torch.stack(keys[1:], dim=-1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 that leaves no pattern: the finaliser of splitmix64."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, n: int) -> Tensor:
    """To the right, as of unsigned numbers: torch's own shift copies the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def largest_prime(most: int) -> int:
    """The largest prime up to ``most``, which is at least 2."""
    return next(n for n in range(most, 1, -1) if all(n % d for d in range(2, math.isqrt(n) + 1)))
