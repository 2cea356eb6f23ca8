"""Packing documents into rows of equal length."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal

import numpy as np

from bov_lightning.kinds import Range, check_least


@dataclass(frozen=True)
class PackingConfig:
    """How documents fill rows."""

    kind: Literal["best_fit", "concat"] = "best_fit"
    """best_fit: rows start with a document, the paper's way; crops what does not fit. concat:
    documents follow one another across rows; crops nothing."""

    buffer: Annotated[int, Range(1, 10_000_000)] = 1000
    """Documents that best_fit chooses from."""

    def __post_init__(self):
        check_least(self, "data: packing")


@dataclass
class PackingCounts:
    """What packing did with the tokens it was given."""

    tokens: int = 0
    """Tokens of all documents."""
    rows: int = 0
    """Full rows."""
    cropped: int = 0
    """Tokens cut off a document to fill a row, or left over at the end."""


def pack_best_fit(
    documents: Iterable[np.ndarray],
    row_len: int,
    buffer_size: int = 1000,
    counts: PackingCounts | None = None,
) -> Iterator[np.ndarray]:
    """Rows of ``row_len`` tokens, packed as in the paper.

    Out of a buffer of documents, the longest that fits the rest of the row is taken; when none
    fits, the shortest is cropped to fill it. Among equals the oldest is taken. Every row thus
    starts with the start of a document. An unfilled last row is dropped.
    """
    counts = PackingCounts() if counts is None else counts
    documents = enumerate(documents)
    # Sorted by (length, age): both searches are bisections.
    buffer: list[tuple[int, int, np.ndarray]] = []

    def refill() -> None:
        for age, ids in islice(documents, buffer_size - len(buffer)):
            counts.tokens += len(ids)
            insort(buffer, (len(ids), age, ids))

    while True:
        row, filled = None, 0
        while filled < row_len:
            refill()
            if not buffer:
                counts.cropped += filled
                return
            if row is None:
                row = np.empty(row_len, dtype=buffer[0][2].dtype)
            space = row_len - filled
            fitting = bisect_left(buffer, (space + 1,)) - 1
            if fitting >= 0:
                oldest = bisect_left(buffer, (buffer[fitting][0],))
                length, _, ids = buffer.pop(oldest)
                row[filled : filled + length] = ids
                filled += length
            else:
                length, _, ids = buffer.pop(0)
                row[filled:] = ids[:space]
                counts.cropped += length - space
                filled = row_len
        counts.rows += 1
        yield row


def pack_concat(
    documents: Iterable[np.ndarray], row_len: int, counts: PackingCounts | None = None
) -> Iterator[np.ndarray]:
    """Rows of ``row_len`` tokens of all documents in a line. Each row starts with the last token
    of the one before, so that every token but the first is a target once.

    An unfilled last row is dropped.
    """
    counts = PackingCounts() if counts is None else counts
    row, filled = None, 0
    for ids in documents:
        counts.tokens += len(ids)
        taken = 0
        while taken < len(ids):
            if row is None:
                row = np.empty(row_len, dtype=ids.dtype)
            n = min(row_len - filled, len(ids) - taken)
            row[filled : filled + n] = ids[taken : taken + n]
            filled, taken = filled + n, taken + n
            if filled == row_len:
                counts.rows += 1
                yield row
                last = row[-1]
                row = np.empty(row_len, dtype=ids.dtype)
                row[0], filled = last, 1
    # A lone first token has been a target already.
    counts.cropped += filled if not counts.rows else filled - 1


def pack(
    documents: Iterable[np.ndarray],
    row_len: int,
    config: PackingConfig,
    counts: PackingCounts | None = None,
) -> Iterator[np.ndarray]:
    """Rows of ``row_len`` tokens, packed as ``config`` says."""
    if config.kind == "concat":
        return pack_concat(documents, row_len, counts)
    return pack_best_fit(documents, row_len, config.buffer, counts)
