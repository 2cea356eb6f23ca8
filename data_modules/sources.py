"""Where documents come from: one class per kind of source.

A source is a list of units (a file, a row group of one), and a unit is a sequence of rows. A
*stripe* is the part of a source that one shard or one lane reads: whole units where there are
enough of them, else every so many-th row of a unit. `data_modules.reader` reads stripes.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from bov_lightning.errors import UserError
from bov_lightning.kinds import COUNT, PATH, Range
from bov_lightning.text import NoTextError, decode, lines
from data_modules.files import decompressed, file_info, find_files, identity, kind_of, open_file

Split = Literal["train", "val"]


class Unit(NamedTuple):
    """A piece of a source that is read from its start."""

    name: str
    """The file, as errors name it."""
    part: int | None = None
    """A row group of it; None: all of it."""


class BadRow(NamedTuple):
    """Stands where a row could not be read."""

    reason: str


class TextSource:
    """The documents of a corpus, always in the same order."""

    def units(self, split: Split, at_least: int) -> list[Unit]:
        """The units of a split, finer ones where there are fewer than ``at_least`` and it can."""
        raise NotImplementedError

    def rows(self, unit: Unit, start: int) -> Iterator[str | BadRow]:
        """The unit's rows from number ``start`` on, one text each; empty ones too.

        Read errors come as they are: the reader retries or names the file.
        """
        raise NotImplementedError

    def origins(self, split: Split) -> dict[str, str]:
        """What a split is read from, such as files: how messages call it, by what tells it from
        all others. Empty where that is not known."""
        return {}

    def fingerprint(self) -> str:
        """Changes when the documents do; runs quote it beside their bits per byte."""
        raise NotImplementedError


def _is_held_out(name: str, one_in: int) -> bool:
    """A choice that depends on the name alone, so that it is the same on every machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % one_in == 0


def cut_at_lines(text: str, max_chars: int) -> Iterator[str]:
    """Pieces of whole lines, as long as fit ``max_chars``; pieces of white space are left out."""
    piece: list[str] = []
    size = 0
    for line in lines(text, keep_ends=True):
        if piece and size + len(line) > max_chars:
            if (joined := "".join(piece)).strip():
                yield joined
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if (joined := "".join(piece)).strip():
        yield joined


class StandardLibrary(TextSource):
    """The Python files of the running interpreter's standard library: text without a download.

    Tests, idlelib and installed packages are left out, so that machines differ little.
    """

    LEFT_OUT = frozenset(
        {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    )

    def __init__(
        self,
        val_one_in: Annotated[int, Range(2, 1_000_000)] = 10,
        max_chars: Annotated[int, COUNT] = 500,
    ):
        """
        Args:
            val_one_in: one file in so many is held out for validation, chosen by its path.
            max_chars: files are cut between lines into documents of at most so many characters
                (a single longer line stays whole). Packing crops what is longer than a row, and
                whole files are much longer than the rows of small models.
        """
        for name, value, least in (("val_one_in", val_one_in, 2), ("max_chars", max_chars, 1)):
            if value < least:
                raise UserError(f"data: source.{name} is {value}: at least {least}")
        self.val_one_in, self.max_chars = val_one_in, max_chars
        self.root = Path(sysconfig.get_paths()["stdlib"])
        self._files: list[str] = []

    def files(self) -> list[str]:
        """Paths relative to the library, sorted; they are looked for once."""
        if self._files:
            return self._files
        found = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = sorted(set(folders) - self.LEFT_OUT)
            relative = Path(folder).relative_to(self.root)
            found += [(relative / name).as_posix() for name in names if name.endswith(".py")]
        if not found:
            raise UserError(
                f"{self.root} holds no .py files: this Python comes without its library's source"
            )
        self._files = sorted(found)
        return self._files

    def units(self, split, at_least):
        held_out = split == "val"
        names = self.files()
        return [Unit(n) for n in names if _is_held_out(n, self.val_one_in) == held_out]

    def rows(self, unit, start):
        text = (self.root / unit.name).read_bytes().decode("utf-8", errors="replace")
        for i, piece in enumerate(cut_at_lines(text, self.max_chars)):
            if i >= start:
                yield piece

    def fingerprint(self):
        digest = hashlib.sha256(f"{self.val_one_in}:{self.max_chars}".encode())
        for name in self.files():
            digest.update(f"{name}\0".encode())
            digest.update(hashlib.sha256((self.root / name).read_bytes()).digest())
        return digest.hexdigest()[:16]


class TextFiles(TextSource):
    """Parquet, JSONL or plain text files, local or at any address that fsspec reads.

    A parquet row, a JSONL line and a whole text file are one document each.
    """

    def __init__(
        self,
        train: Annotated[list[str], PATH],
        val: Annotated[list[str], PATH],
        column: str = "text",
    ):
        """
        Args:
            train: paths or glob patterns of the training files; relative ones start where the
                command runs. A file that several of them name is read once.
            val: the same of the validation files.
            column: the column of parquet and JSONL files that holds the text.
        """
        self.patterns = {"train": train, "val": val}
        self.column = column
        self._files: dict[Split, list[str]] = {}

    def files(self, split: Split) -> list[str]:
        """Every file once, sorted within the first pattern that names it; a pattern without one is
        a `UserError`. They are looked for once: every stripe asks."""
        if split in self._files:
            return self._files[split]
        found: dict[str, str] = {}
        for pattern in self.patterns[split]:
            names = find_files(pattern)
            if not names:
                here = "" if "://" in pattern else f", seen from {os.getcwd()}"
                raise UserError(f"data: no file matches {pattern} ({split}){here}")
            for name in names:
                found.setdefault(identity(name), name)
        if not found:
            raise UserError(f"data: source.{split} names no files")
        self._files[split] = list(found.values())
        return self._files[split]

    def origins(self, split):
        return {identity(name): name for name in self.files(split)}

    def units(self, split, at_least):
        names = self.files(split)
        if len(names) >= at_least or not any(kind_of(name) == ".parquet" for name in names):
            return [Unit(name) for name in names]
        units = []
        for name in names:
            if kind_of(name) == ".parquet":
                with open_file(name) as file:
                    units += [Unit(name, i) for i in range(_parquet(file, name).num_row_groups)]
            else:
                units.append(Unit(name))
        return units

    def rows(self, unit, start):
        kind, text = kind_of(unit.name), None
        with open_file(unit.name) as file:
            if kind == ".parquet":
                yield from self._parquet_rows(file, unit, start)
            elif kind.startswith(".jsonl"):
                yield from self._json_rows(decompressed(file, unit.name), start)
            else:
                text = file.read() if start == 0 else None
        if text is not None:
            yield _whole(text)

    def _parquet_rows(self, file: Any, unit: Unit, start: int) -> Iterator[str | BadRow]:
        table = _parquet(file, unit.name)
        names = table.schema_arrow.names
        if self.column not in names:
            raise UserError(
                f"data: {unit.name} has no column {self.column!r}: its columns are "
                f"{', '.join(names)}"
            )
        groups = None if unit.part is None else [unit.part]
        row = 0
        for batch in table.iter_batches(256, row_groups=groups, columns=[self.column]):
            if row + len(batch) > start:
                for value in _values(batch.column(0).slice(max(0, start - row))):
                    yield _text(value, self.column)
            row += len(batch)

    def _json_rows(self, rows: Any, start: int) -> Iterator[str | BadRow]:
        for i, data in enumerate(rows):
            if i < start:
                continue
            try:
                text = decode(data)
                yield _text(json.loads(text)[self.column] if text.strip() else "", self.column)
            except NoTextError as error:
                yield BadRow(str(error))
            except KeyError:
                yield BadRow(f"no key {self.column!r}")
            except (ValueError, TypeError, RecursionError):
                yield BadRow("no JSON object")

    def fingerprint(self):
        """Names, sizes, and the first and last 64 kB of every file: reading all takes too long."""
        digest = hashlib.sha256(self.column.encode())
        for split in ("train", "val"):
            for name in self.files(split):
                info = file_info(name)
                size = info.get("size") or 0
                line = f"{split}:{Path(name).name}:{size}:{info.get('ETag')}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
                if "://" not in name:
                    with open_file(name) as file:
                        digest.update(file.read(2**16))
                        file.seek(max(0, size - 2**16))
                        digest.update(file.read())
        return digest.hexdigest()[:16]


def _parquet(file: Any, name: str) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data: {name} is no parquet file: {error}") from error


def _values(column: Any) -> Iterator[Any]:
    """The values of a parquet column, `BadRow` for text that is no UTF-8 in spite of its type."""
    import pyarrow

    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        values = map(_decoded, column.cast(pyarrow.large_binary()).to_pylist())
    yield from values


def _decoded(data: bytes | None) -> str | BadRow | None:
    try:
        return data if data is None else str(data, "utf-8")
    except UnicodeDecodeError as error:
        return BadRow(f"invalid UTF-8 at byte {error.start}")


def _text(value: Any, column: str) -> str | BadRow:
    """The text of a row's column, which may be bytes; "" for null."""
    if isinstance(value, str | BadRow):
        return value
    if isinstance(value, bytes):
        return _whole(value)
    return "" if value is None else BadRow(f"{column} is no text but {type(value).__name__}")


def _whole(data: bytes) -> str | BadRow:
    """The document that bytes are."""
    try:
        text = decode(data)
    except NoTextError as error:
        return BadRow(str(error))
    # UTF-16 of many languages is valid UTF-8, with a NUL beside every letter.
    first = text[:1000]
    return BadRow("NUL bytes: UTF-16, or no text") if 4 * first.count("\0") > len(first) else text


class HubDataset(TextSource):
    """A dataset of the Hugging Face hub, or a local folder in its layout, streamed."""

    def __init__(
        self,
        path: Annotated[str, PATH],
        name: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        column: str = "text",
        revision: str | None = None,
    ):
        """
        Args:
            path: the dataset's id, or a local folder.
            name: its configuration, where it has several.
            train_split: the split to train on.
            val_split: the split to validate on.
            column: the column that holds the text.
            revision: a commit or tag; give one, so that the data cannot change under a run.
        """
        self.settings = {"path": path, "name": name, "revision": revision}
        self.splits = {"train": train_split, "val": val_split}
        self.column = column

    def origins(self, split):
        called = f"{self.settings['path']}, split {self.splits[split]}"
        return {json.dumps([self.settings, self.splits[split]]): called}

    def _dataset(self, split: Split) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(**self.settings, split=self.splits[split], streaming=True)
        except (OSError, ValueError) as error:
            path = self.settings["path"]
            raise UserError(
                f"data: the dataset {path} ({self.splits[split]}) cannot be opened: {error}"
            ) from error

    def units(self, split, at_least):
        return [Unit(split, i) for i in range(self._dataset(split).num_shards)]

    def rows(self, unit, start):
        dataset = self._dataset(unit.name)
        for row in dataset.shard(dataset.num_shards, unit.part).skip(start):
            if self.column not in row:
                raise UserError(
                    f"data: {self.settings['path']} has no column {self.column!r}: its columns "
                    f"are {', '.join(row)}"
                )
            yield _text(row[self.column], self.column)

    def fingerprint(self):
        text = json.dumps([self.settings, self.splits, self.column])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Weighted:
    """A source and its share of the documents."""

    source: TextSource
    """The source."""
    weight: Annotated[float, Range(above=0)] = 1.0
    """Its share, relative to the other weights."""


class Mixture(TextSource):
    """Several sources whose documents come in fixed proportions, in a fixed order."""

    def __init__(self, sources: list[Weighted]):
        """
        Args:
            sources: each with its weight. A source that ends early leaves the rest to the others;
                when streaming, it starts again instead.
        """
        if not sources or any(part.weight <= 0 for part in sources):
            raise UserError("data: a mixture needs sources, each with a weight above 0")
        self.sources = sources

    def origins(self, split):
        return {k: v for part in self.sources for k, v in part.source.origins(split).items()}

    def fingerprint(self):
        text = json.dumps([(part.source.fingerprint(), part.weight) for part in self.sources])
        return hashlib.sha256(text.encode()).hexdigest()[:16]
