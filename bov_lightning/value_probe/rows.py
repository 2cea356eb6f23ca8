"""From texts to rows of tokens, in parts that share no text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bov_lightning.errors import UserError
from bov_lightning.value_probe.settings import ProbeSettings
from evaluation.encoding import document_start

TEXTS_AT_ONCE = 16
LONGEST = 20
"""Documents are cut into pieces of this part of all tokens, so that each part gets some."""
CHOICE = 5
"""One in so many held-out tokens decides settings and the order."""


@dataclass(frozen=True)
class Rows:
    """Tokens, as rows that each start with the token that starts documents."""

    ids: Tensor
    """(R, T) int64."""
    keys: Tensor
    """(R, T) int64: the row of tables that a token takes; they have rows for ids that occur."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_token(self) -> int:
        """All of them."""
        return self.ids.numel()

    def __getitem__(self, index: slice) -> "Rows":
        return Rows(self.ids[index], self.keys[index])


@dataclass(frozen=True)
class Text:
    """The text of a probe."""

    calibration: Rows
    choice: Rows
    """On which settings and the order are chosen."""
    measured: Rows
    vocabulary: Tensor
    """(N,) int64: the id of each key; those that calibration alone has come last."""
    n_evaluated: int
    """How many come first."""
    start: int
    """The token that starts documents, which is no target."""


def make_text(
    texts: Iterable[str], tokenizer: Any, settings: ProbeSettings, context: int, n_embedding: int
) -> Text:
    """Documents go to the part that is furthest behind its share, whole or in long pieces.

    Args:
        texts: one document each; no more are taken than needed.
        tokenizer: of ``transformers``.
        settings: how many tokens, and how long rows are.
        context: tokens that the model can see.
        n_embedding: rows of its embedding.

    Raises:
        UserError: less than a batch, or ids that the embedding lacks.
    """
    n_token = min(settings.row_length, context)
    start = document_start(tokenizer)
    n_choice = max(1, settings.held_out // CHOICE // n_token)
    wanted = {
        "calibration": max(1, settings.tokens // n_token),
        "choice": n_choice,
        "measured": max(1, settings.held_out // n_token - n_choice),
    }
    parts: dict[str, list[list[int]]] = {name: [] for name in wanted}
    given = dict.fromkeys(wanted, 0)
    longest = max(n_token, sum(wanted.values()) * n_token // LONGEST)
    for piece in _pieces(texts, tokenizer, start, longest):
        open_parts = [n for n, rows in wanted.items() if given[n] < rows * n_token]
        if not open_parts:
            break
        name = min(open_parts, key=lambda n: given[n] / wanted[n])
        parts[name].append(piece)
        given[name] += len(piece)
    # Held-out rows are mixed, since what a few of them say is taken for what all would say.
    made = {
        name: _rows(parts[name], start, n_token, mixed=name != "calibration")[: wanted[name]]
        for name in wanted
    }
    if len(made["calibration"]) < settings.batch_size or not all(map(len, made.values())):
        raise UserError(
            f"the text holds {sum(given.values()):,} tokens, too few for a batch of "
            f"{settings.batch_size} rows of {n_token} tokens and held-out rows beside it: give "
            "more --data, or a smaller --row-length and --batch-size"
        )
    every = np.concatenate([rows.ravel() for rows in made.values()])
    if every.max() >= n_embedding:
        raise UserError(
            f"the text has token id {every.max()}, but the model's embedding has {n_embedding} "
            "rows: the tokenizer is not this model's"
        )
    evaluated = np.unique(np.concatenate([made["choice"].ravel(), made["measured"].ravel()]))
    vocabulary = np.concatenate((evaluated, np.setdiff1d(every, evaluated)))
    key_of = np.zeros(vocabulary.max() + 1, dtype=np.int64)
    key_of[vocabulary] = np.arange(len(vocabulary))
    rows = {n: Rows(torch.from_numpy(i), torch.from_numpy(key_of[i])) for n, i in made.items()}
    return Text(
        **rows, vocabulary=torch.from_numpy(vocabulary), n_evaluated=len(evaluated), start=start
    )


def _pieces(texts: Iterable[str], tokenizer: Any, start: int, longest: int) -> Iterator[list[int]]:
    """Documents as tokens, the starting one first; long ones in pieces that each start with it."""
    texts = iter(texts)
    while several := list(islice(texts, TEXTS_AT_ONCE)):
        encoded = tokenizer(several, add_special_tokens=False, verbose=False)
        for ids in encoded["input_ids"]:
            for first in range(0, len(ids), longest):
                yield [start, *ids[first : first + longest]]


def _rows(pieces: list[list[int]], start: int, n_token: int, mixed: bool) -> np.ndarray:
    """(R, T) int64, in an order of their own if ``mixed``; what fills no row is left out."""
    stream = np.concatenate([np.array(piece, dtype=np.int64) for piece in pieces or [[]]])
    n_row = len(stream) // (n_token - 1)
    rows = stream[: n_row * (n_token - 1)].astype(np.int64).reshape(n_row, n_token - 1)
    if mixed:
        rows = np.random.default_rng(0).permutation(rows)
    return np.concatenate((np.full((n_row, 1), start, dtype=np.int64), rows), axis=1)
