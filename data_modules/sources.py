"""Where documents come from: one class per kind of source.

A source is a list of units (a file, a row group of one), and a unit is a sequence of rows. A
*stripe* is the part of a source that one shard or one lane reads: whole units where there are
enough of them, else every so many-th row of a unit. `data_modules.reader` reads stripes.
"""

import gzip
import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from bov_lightning.errors import UserError
from bov_lightning.kinds import COUNT, PATH, Range

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
    for line in text.splitlines(keepends=True):
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

    def files(self) -> list[str]:
        """Paths relative to the library, sorted."""
        found = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = sorted(set(folders) - self.LEFT_OUT)
            relative = Path(folder).relative_to(self.root)
            found += [(relative / name).as_posix() for name in names if name.endswith(".py")]
        if not found:
            raise UserError(
                f"{self.root} holds no .py files: this Python comes without its library's source"
            )
        return sorted(found)

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

    KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".md", ".py")

    def __init__(
        self,
        train: Annotated[list[str], PATH],
        val: Annotated[list[str], PATH],
        column: str = "text",
    ):
        """
        Args:
            train: paths or glob patterns of the training files.
            val: the same of the validation files.
            column: the column of parquet and JSONL files that holds the text.
        """
        self.patterns = {"train": train, "val": val}
        self.column = column

    def files(self, split: Split) -> list[str]:
        """Every file, sorted within its pattern; a pattern without one is a `UserError`."""
        import fsspec

        found = []
        for pattern in self.patterns[split]:
            try:
                system, path = fsspec.core.url_to_fs(pattern)
                matches = sorted(system.glob(path)) if any(c in path for c in "*?[") else [path]
                # Whether a remote file is there shows when it is read, with retries.
                local = [match for match in matches if "://" not in pattern]
                missing = not matches or not all(system.exists(match) for match in local)
            except (OSError, ImportError, ValueError) as error:
                raise UserError(f"data: {pattern} cannot be listed: {error}") from error
            if missing:
                raise UserError(f"data: no file matches {pattern} ({split})")
            found += [system.unstrip_protocol(match) for match in matches]
        for name in found:
            if not name.endswith(self.KINDS):
                kinds = " ".join(self.KINDS)
                raise UserError(f"data: {name} is of no known kind: {kinds}")
        if not found:
            raise UserError(f"data: source.{split} names no files")
        return [name.removeprefix("file://") for name in found]

    def units(self, split, at_least):
        names = self.files(split)
        if len(names) >= at_least or not any(name.endswith(".parquet") for name in names):
            return [Unit(name) for name in names]
        units = []
        for name in names:
            if name.endswith(".parquet"):
                with self._open(name) as file:
                    units += [Unit(name, i) for i in range(self._parquet(file).num_row_groups)]
            else:
                units.append(Unit(name))
        return units

    def _open(self, name: str) -> Any:
        import fsspec

        return fsspec.open(name, "rb").open()

    def _parquet(self, file: Any) -> Any:
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"data: {file.name} is no parquet file: {error}") from error

    def rows(self, unit, start):
        with self._open(unit.name) as file:
            if unit.name.endswith(".parquet"):
                yield from self._parquet_rows(file, unit, start)
            elif ".jsonl" in unit.name[-10:]:
                yield from self._json_rows(_decompressed(file, unit.name), start)
            elif start == 0:
                yield _decoded(file.read())

    def _parquet_rows(self, file: Any, unit: Unit, start: int) -> Iterator[str | BadRow]:
        table = self._parquet(file)
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
                for text in batch.column(0).slice(max(0, start - row)).to_pylist():
                    ok = text is None or isinstance(text, str)
                    yield (text or "") if ok else BadRow(f"{self.column} is no text")
            row += len(batch)

    def _json_rows(self, lines: Any, start: int) -> Iterator[str | BadRow]:
        for i, line in enumerate(lines):
            if i < start:
                continue
            text = _decoded(line)
            if isinstance(text, BadRow):
                yield text
                continue
            try:
                value = json.loads(text)[self.column] if text.strip() else ""
                ok = value is None or isinstance(value, str)
                yield (value or "") if ok else BadRow(f"{self.column} is no text")
            except KeyError:
                yield BadRow(f"no key {self.column!r}")
            except (ValueError, TypeError):
                yield BadRow("no JSON object")

    def fingerprint(self):
        """Names, sizes, and the first and last 64 kB of every file: reading all takes too long."""
        import fsspec

        digest = hashlib.sha256(self.column.encode())
        for split in ("train", "val"):
            for name in self.files(split):
                system, path = fsspec.core.url_to_fs(name)
                info = system.info(path)
                size = info.get("size") or 0
                digest.update(f"{split}:{Path(name).name}:{size}:{info.get('ETag')}\n".encode())
                if "://" not in name:
                    with open(name, "rb") as file:
                        digest.update(file.read(2**16))
                        file.seek(max(0, size - 2**16))
                        digest.update(file.read())
        return digest.hexdigest()[:16]


def _decoded(data: bytes) -> str | BadRow:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow(f"invalid UTF-8 at byte {error.start}")


def _decompressed(file: Any, name: str) -> Any:
    if name.endswith(".gz"):
        return gzip.open(file)
    if name.endswith(".zst"):
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
        return io.BufferedReader(stream)
    return file


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
            text = row[self.column]
            ok = text is None or isinstance(text, str)
            yield (text or "") if ok else BadRow(f"{self.column} is no text")

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

    def fingerprint(self):
        text = json.dumps([(part.source.fingerprint(), part.weight) for part in self.sources])
        return hashlib.sha256(text.encode()).hexdigest()[:16]
