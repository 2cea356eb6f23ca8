"""Text files: which ones a pattern names, of what kind each is, and how it is opened.

A name with ``://`` is an address that fsspec reads; any other is a path of this machine, taken as
it is written.
"""

import glob
import gzip
import io
import os
from pathlib import Path
from typing import Any

from bov_lightning.errors import UserError

KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".md", ".py")
"""How the names of text files end, in lower or upper case."""

MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
"""What compressed files start with."""

ADVICE = {
    ".json": "; one JSON object per line is .jsonl",
    ".csv": "; a table is .parquet, or .jsonl with an object per row",
    ".tsv": "; a table is .parquet, or .jsonl with an object per row",
} | dict.fromkeys(
    (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz"),
    "; unpack it, or make it .jsonl.gz or .jsonl.zst",
)
"""What to do with files of other kinds, by how their names end."""


def find_files(pattern: str) -> list[str]:
    """The files that a path, an address or a glob pattern names, sorted; [] where there are none.

    What is there under its own name is no pattern: neither the working folder, nor a folder or a
    file that is called ``exp[v2]``. Local files are absolute paths.

    Raises:
        UserError: a folder, a kind of file that is not read, an address that cannot be listed.
    """
    for protocol in ("file://", "local://"):
        pattern = pattern.removeprefix(protocol)
    names = _remote(pattern) if "://" in pattern else _local(os.path.expanduser(pattern))
    for name in names:
        kind_of(name)
    return names


def _local(pattern: str) -> list[str]:
    folder = "/" if pattern.startswith("/") else os.getcwd()
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    while parts and os.path.lexists(path := os.path.join(folder, parts[0])):
        folder, parts = path, parts[1:]
    if not parts:
        return [_readable(folder)]
    rest = "/".join(parts)
    if not any(character in rest for character in "*?["):
        return []
    matches = glob.glob(rest, root_dir=folder, recursive=True, include_hidden=True)
    paths = sorted({os.path.join(folder, match) for match in matches})
    # Folders beside the files are not meant, but one called x.parquet holds text.
    return [_readable(path) for path in paths if not os.path.isdir(path) or _known(path)]


def _readable(path: str) -> str:
    if os.path.isdir(path):
        raise UserError(f"data: {path} is a folder: name the files in it, such as {path}/*.jsonl")
    if not os.path.exists(path):
        raise UserError(f"data: {path} is a link to a file that is not there")
    if not os.path.isfile(path):
        raise UserError(f"data: {path} is no regular file, so that it can be read only once")
    return path


def _remote(pattern: str) -> list[str]:
    """Whether a single address is there shows when it is read, with retries."""
    import fsspec

    # In an address of the web a question mark starts the query.
    magic = "*[" if _is_web(pattern) else "*?["
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        matches = sorted(system.glob(path)) if any(c in path for c in magic) else [path]
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"data: {pattern} cannot be listed: {error}") from error
    return [system.unstrip_protocol(match) for match in matches]


def _is_web(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def identity(name: str) -> str:
    """The same for two names of one file, and for no other."""
    return name if "://" in name else os.path.realpath(name)


def _known(name: str) -> str | None:
    path = name.partition("#")[0].partition("?")[0] if _is_web(name) else name
    return next((kind for kind in KINDS if path.lower().endswith(kind)), None)


def kind_of(name: str) -> str:
    """The one of `KINDS` that a file is; another kind is a `UserError`."""
    if (kind := _known(name)) is None:
        advice = ADVICE.get(Path(name).suffix.lower(), "")
        raise UserError(f"data: {name} is of no known kind: {' '.join(KINDS)}{advice}")
    return kind


def file_info(name: str) -> dict[str, Any]:
    """What is known of a file without reading it: its ``size`` in bytes, perhaps an ``ETag``."""
    if "://" not in name:
        return {"size": os.stat(name).st_size}
    import fsspec

    system, path = fsspec.core.url_to_fs(name)
    return system.info(path)


def open_file(name: str) -> Any:
    """A binary file."""
    if "://" not in name:
        return open(name, "rb")
    import fsspec

    return fsspec.open(name, "rb").open()


def decompressed(file: Any, name: str) -> Any:
    """The lines of an open JSONL file, as bytes.

    Raises:
        UserError: a local file that is not compressed as its name says.
    """
    named = next((end for end in MAGIC if kind_of(name).endswith(end)), None)
    if "://" not in name and (start := file.read(4)):
        file.seek(0)
        found = next((end for end, magic in MAGIC.items() if start.startswith(magic)), None)
        if found != named:
            how = f"compressed as {found} files are" if found else "not compressed"
            raise UserError(f"data: {name} cannot be read: unlike its name says, it is {how}")
    if named == ".gz":
        return gzip.open(file)
    if named == ".zst":
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
        return io.BufferedReader(stream)
    return file
