"""Reading one stripe of a source: resumable at any document, retrying what fails."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from bov_lightning.errors import UserError
from bov_lightning.text import NoTextError, check
from data_modules.sources import BadRow, Mixture, Split, TextSource, Unit

OnError = Literal["error", "skip"]

RETRIES = 5
FIRST_WAIT_S = 0.5
"""Doubles with every retry."""

PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass
class ReadCounts:
    """What a reader came across."""

    documents: int = 0
    """Documents that it gave."""
    empty: int = 0
    """Rows without text."""
    skipped: int = 0
    """Rows that could not be read, under on_error: skip."""


def stripe_of(units: list[Unit], index: int, n_stripe: int) -> list[tuple[Unit, int, int]]:
    """The units of stripe ``index``: (unit, share, turn), of which it takes the rows with
    ``row % share == turn``."""
    if len(units) >= n_stripe:
        return [(unit, 1, 0) for unit in units[index::n_stripe]]
    unit = index % len(units)
    share = len(range(unit, n_stripe, len(units)))
    return [(units[unit], share, index // len(units))]


class StripeReader:
    """Iterates over the documents of one stripe.

    ``state`` is where it stands after the last document; a reader that is given it continues there.
    """

    def __init__(
        self,
        source: TextSource,
        split: Split,
        index: int = 0,
        n_stripe: int = 1,
        on_error: OnError = "error",
        forever: bool = False,
        units: list[Unit] | None = None,
    ):
        """
        Args:
            source: of the documents.
            split: of its splits.
            index: of its stripes.
            n_stripe: how many there are.
            on_error: what to do about rows that cannot be read.
            forever: starts again at its end.
            units: of the split, where somebody has listed them.
        """
        self.source, self.on_error, self.forever = source, on_error, forever
        units = source.units(split, n_stripe) if units is None else units
        if not units:
            raise UserError(f"data: the {split} split of the corpus is empty")
        self.stripe = stripe_of(units, index, n_stripe)
        self.counts = ReadCounts()
        self.lap, self.unit, self.row = 0, 0, 0

    @property
    def state(self) -> list[int]:
        """Laps done, units done in this lap, rows done in this unit."""
        return [self.lap, self.unit, self.row]

    @state.setter
    def state(self, state: list[int]) -> None:
        self.lap, self.unit, self.row = state

    @property
    def fraction(self) -> float:
        """Units done of this lap."""
        return self.unit / len(self.stripe)

    def __iter__(self) -> Iterator[str]:
        while True:
            before = self.counts.documents
            for unit, share, turn in self.stripe[self.unit :]:
                for text in self._rows(unit):
                    self.row += 1
                    if (self.row - 1) % share != turn:
                        continue
                    text = _checked(text)
                    if isinstance(text, BadRow):
                        self._bad(unit, text)
                    elif not text or text.isspace():
                        self.counts.empty += 1
                    else:
                        self.counts.documents += 1
                        yield text
                self.unit, self.row = self.unit + 1, 0
            if not self.forever:
                return
            if self.counts.documents == before:
                raise UserError(
                    "data: a stripe of the corpus holds no text: use fewer lanes, or more "
                    "documents (a whole .txt, .md or .py file is one)"
                )
            self.lap, self.unit = self.lap + 1, 0

    def _bad(self, unit: Unit, row: BadRow) -> None:
        if self.on_error == "error":
            group = "" if unit.part is None else f" row group {unit.part}"
            raise UserError(
                f"data: {unit.name}{group} row {self.row}: {row.reason}; on_error: skip leaves "
                "such rows out"
            )
        self.counts.skipped += 1

    def _rows(self, unit: Unit) -> Iterator[str | BadRow]:
        """The rows from ``self.row`` on; read errors that may pass are retried from there."""
        attempt = 0
        while True:
            try:
                for text in self.source.rows(unit, self.row):
                    attempt = 0
                    yield text
                return
            except UserError:
                raise
            except Exception as error:
                if attempt == RETRIES or not _may_pass(error, unit):
                    detail = " ".join(str(error).split()) or type(error).__name__
                    raise UserError(f"data: {unit.name} cannot be read: {detail}") from error
            time.sleep(FIRST_WAIT_S * 2**attempt)
            attempt += 1


def _checked(text: str | BadRow) -> str | BadRow:
    """Characters that are none, as JSON can write them, would end the tokenizer."""
    try:
        return text if isinstance(text, BadRow) else check(text)
    except NoTextError as error:
        return BadRow(str(error))


def _may_pass(error: Exception, unit: Unit) -> bool:
    """Whether trying again can help: what the system and the network report, not bad content."""
    if os.path.isabs(unit.name):
        # A local file that is cut off, or not packed as it should be: no system call failed.
        return bool(getattr(error, "errno", None)) and not isinstance(error, PERMANENT)
    if isinstance(error, PERMANENT):
        # fsspec says that a file is not found when a server cannot be asked.
        return "://" in unit.name
    network = type(error).__module__.partition(".")[0] in ("aiohttp", "httpx", "requests", "fsspec")
    return network or isinstance(error, OSError | EOFError)


class MixedReader:
    """Iterates over the stripes of several sources in the proportions of their weights.

    The next document comes from the source that is furthest behind its share, so the order depends
    on nothing but the weights.
    """

    def __init__(self, readers: list[Any], weights: list[float]):
        self.readers = readers
        self.shares = [weight / sum(weights) for weight in weights]
        self.given = [0] * len(readers)
        self.ended = [False] * len(readers)

    @property
    def counts(self) -> ReadCounts:
        """Summed over the sources."""
        return ReadCounts(*(sum(n) for n in zip(
            *((c.documents, c.empty, c.skipped) for c in (r.counts for r in self.readers)),
            strict=True,
        )))  # fmt: skip

    @property
    def state(self) -> list:
        """Documents given and state of every source."""
        return [list(self.given), [reader.state for reader in self.readers]]

    @state.setter
    def state(self, state: list) -> None:
        self.given = list(state[0])
        for reader, own in zip(self.readers, state[1], strict=True):
            reader.state = own

    @property
    def fraction(self) -> float:
        """Mean over the sources."""
        return sum(reader.fraction for reader in self.readers) / len(self.readers)

    def __iter__(self) -> Iterator[str]:
        iterators = [iter(reader) for reader in self.readers]
        while not all(self.ended):
            total = sum(self.given) + 1
            behind = [
                -1e300 if ended else share * total - given
                for share, given, ended in zip(self.shares, self.given, self.ended, strict=True)
            ]
            chosen = behind.index(max(behind))
            text = next(iterators[chosen], None)
            if text is None:
                self.ended[chosen] = True
            else:
                self.given[chosen] += 1
                yield text


def open_stripe(source: TextSource, split: Split, *args, **kwargs) -> StripeReader | MixedReader:
    """A reader of one stripe of any source; arguments as for `StripeReader`."""
    if isinstance(source, Mixture):
        readers = [open_stripe(part.source, split, *args, **kwargs) for part in source.sources]
        return MixedReader(readers, [part.weight for part in source.sources])
    return StripeReader(source, split, *args, **kwargs)
