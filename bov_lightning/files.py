"""Directories that are either complete or not there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from bov_lightning.errors import UserError

FULL = 2**20
"""A file system with fewer free bytes than this counts as full."""


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Creates a directory with what ``write`` puts there, complete or absent.

    An existing one is replaced. A full disk is a `UserError`, and nothing is left behind.
    """
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        for path in sorted(aside.rglob("*")):
            _fsync(path)
        _fsync(aside)
    except BaseException as error:
        # Libraries report a full disk as errors of their own kinds.
        full = isinstance(error, Exception) and shutil.disk_usage(target.parent).free < FULL
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) or full:
            reason = getattr(error, "strerror", None) or "No space left on device"
            raise UserError(f"{target} cannot be written: {reason}") from error
        raise
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)
    _fsync(target.parent)
