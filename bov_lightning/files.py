"""Files and directories that are either complete or not there."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bov_lightning.errors import UserError

FULL = 2**20
"""A file system with fewer free bytes than this counts as full."""


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _complete_or_absent(target: Path) -> Iterator[Path]:
    """A place beside ``target`` to write to, moved there at the end; nothing is left on errors.

    A file system error, and a full disk under whatever name, is a `UserError`.
    """
    aside = target.with_name(f".{target.name}.partial")
    _remove(aside)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        for path in (*sorted(aside.rglob("*")), aside):
            _fsync(path)
    except BaseException as error:
        # Libraries report a full disk as errors of their own kinds.
        full = isinstance(error, Exception) and _is_full(target)
        _remove(aside)
        if isinstance(error, UserError) or not (isinstance(error, OSError) or full):
            raise
        reason = getattr(error, "strerror", None) or "No space left on device"
        raise UserError(f"{target} cannot be written: {reason}") from error
    if target.is_dir():
        shutil.rmtree(target)
    aside.replace(target)
    _fsync(target.parent)


def _is_full(path: Path) -> bool:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return shutil.disk_usage(folder).free < FULL


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Creates a directory with what ``write`` puts there; an existing one is replaced."""
    with _complete_or_absent(target) as aside:
        aside.mkdir()
        write(aside)


def write_file(target: Path, content: str | Callable[[BinaryIO], None]) -> None:
    """Creates a file with a text, or with what a function writes; an existing one is replaced."""
    with _complete_or_absent(target) as aside, open(aside, "wb") as file:
        if isinstance(content, str):
            file.write(content.encode("utf-8"))
        else:
            content(file)
        file.flush()
