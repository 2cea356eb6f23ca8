"""Directories that are either complete or not there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from bov_lightning.errors import UserError


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
        shutil.rmtree(aside, ignore_errors=True)
        # safetensors and torch.save report a full disk as errors of their own kinds.
        full = isinstance(error, OSError) or "No space left" in str(error)
        if isinstance(error, Exception) and (full or "failed writing" in str(error)):
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(f"{target} cannot be written: {reason}") from error
        raise
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)
    _fsync(target.parent)
