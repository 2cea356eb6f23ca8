"""Where documents come from: one class per kind of source."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bov_lightning.errors import UserError

Split = Literal["train", "val"]


class TextSource:
    """Yields the documents of a corpus, always in the same order."""

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of one split, none of them empty."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Changes when any document does; runs quote it beside their bits per byte."""
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

    def __init__(self, val_one_in: int = 10, max_chars: int = 500):
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

    def _files(self) -> list[str]:
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

    def documents(self, split):
        for name in self._files():
            if _is_held_out(name, self.val_one_in) == (split == "val"):
                text = (self.root / name).read_bytes().decode("utf-8", errors="replace")
                yield from cut_at_lines(text, self.max_chars)

    def fingerprint(self):
        digest = hashlib.sha256(f"{self.val_one_in}:{self.max_chars}".encode())
        for name in self._files():
            digest.update(f"{name}\0".encode())
            digest.update(hashlib.sha256((self.root / name).read_bytes()).digest())
        return digest.hexdigest()[:16]


class TextFiles(TextSource):
    """Parquet, JSONL or plain text files, local or at any address that fsspec reads.

    A parquet row, a JSONL line and a whole text file are one document each.
    """

    def __init__(
        self,
        train: list[str],
        val: list[str],
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

    def _files(self, split: Split) -> list[tuple]:
        """(file system, path) of every file, sorted."""
        import fsspec

        found = []
        for pattern in self.patterns[split]:
            try:
                system, path = fsspec.core.url_to_fs(pattern)
                matches = sorted(system.glob(path)) if any(c in path for c in "*?[") else [path]
                missing = not matches or not all(system.exists(match) for match in matches)
            except (OSError, ImportError, ValueError) as error:
                raise UserError(f"data: {pattern} cannot be listed: {error}") from error
            if missing:
                raise UserError(f"data: no file matches {pattern} ({split})")
            found += [(system, match) for match in matches]
        if not found:
            raise UserError(f"data: source.{split} names no files")
        return found

    def documents(self, split):
        for system, path in self._files(split):
            try:
                yield from filter(str.strip, self._read(system, path))
            except UserError:
                raise
            except (OSError, ValueError) as error:
                raise UserError(f"data: {path} cannot be read: {error}") from error

    def _read(self, system, path: str) -> Iterator[str]:
        if path.endswith(".parquet"):
            import pyarrow.parquet

            with system.open(path, "rb") as file:
                table = pyarrow.parquet.ParquetFile(file)
                if self.column not in table.schema_arrow.names:
                    raise UserError(
                        f"data: {path} has no column {self.column!r}: its columns are "
                        f"{', '.join(table.schema_arrow.names)}"
                    )
                for batch in table.iter_batches(batch_size=256, columns=[self.column]):
                    yield from (text for text in batch.column(0).to_pylist() if text)
        elif path.endswith((".jsonl", ".jsonl.gz")):
            with system.open(path, "rt", encoding="utf-8", compression="infer") as file:
                for number, line in enumerate(file, 1):
                    try:
                        yield json.loads(line)[self.column] or ""
                    except (ValueError, KeyError, TypeError) as error:
                        raise UserError(
                            f"data: {path} line {number} holds no JSON object with the key "
                            f"{self.column!r}"
                        ) from error
        elif path.endswith((".txt", ".md", ".py")):
            with system.open(path, "rt", encoding="utf-8") as file:
                yield file.read()
        else:
            raise UserError(f"data: {path} is of no known kind: .parquet, .jsonl[.gz] or .txt")

    def fingerprint(self):
        digest = hashlib.sha256(self.column.encode())
        for split in ("train", "val"):
            for system, path in self._files(split):
                info = system.info(path)
                identity = info.get("ETag") or info.get("mtime") or info.get("etag")
                digest.update(f"{split}:{path}:{info.get('size')}:{identity}\n".encode())
        return digest.hexdigest()[:16]
