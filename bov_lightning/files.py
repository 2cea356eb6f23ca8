"""Files and directories that are either complete or not there."""

import contextlib
import errno
import glob
import os
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bov_lightning.errors import StorageError, UserError

FULL = 2**20
"""A file system with fewer free bytes than this counts as full."""

ABANDONED_AFTER_S = 24 * 3600.0
"""Half a file that nobody has written to for so long is nobody's."""

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EFBIG)
"""Error numbers of what is no mistake of the user's, and may pass."""


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def aside_of(target: Path) -> Path:
    """Where several processes write ``target`` together before it is put in place.

    Somebody sees to it that no others write the same (`bov_lightning.claims`).
    """
    return target.with_name(f".{target.name}.partial")


def _own_aside(target: Path) -> Path:
    """Where this thread writes ``target``, whoever else may do the same at the same time."""
    mine = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
    return target.with_name(f".{target.name}.{mine}.partial")


def _remove_abandoned(target: Path) -> None:
    """Removes what writers of ``target`` that were killed have left.

    Those of another machine count as killed when they have not written for long.
    """
    for path in target.parent.glob(f".{glob.escape(target.name)}.*-*-*.partial"):
        host, pid, _ = path.name.removesuffix(".partial").rsplit("-", 2)
        here = host == f".{target.name}.{socket.gethostname()}" and pid.isdigit()
        with contextlib.suppress(OSError):
            if here:
                is_left = not Path("/proc", pid).exists() and Path("/proc/self").exists()
            else:
                is_left = time.time() - path.stat().st_mtime > ABANDONED_AFTER_S
            if is_left:
                remove(path)


def _open_to_others(aside: Path) -> None:
    """Gives the files in a directory the permissions that the umask leaves to new ones.

    Libraries make theirs readable for their owner alone.
    """
    # The umask cannot be read without changing it for all threads; the directory shows it.
    usual = stat.S_IMODE(aside.stat().st_mode) & 0o666
    for path in aside.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_file() and mode != mode | usual:
            # Some network file systems know no modes.
            with contextlib.suppress(OSError):
                path.chmod(mode | usual)


def put_in_place(aside: Path, target: Path) -> None:
    """Makes what lies aside durable and renames it to ``target``, replacing what was there."""
    if aside.is_dir():
        _open_to_others(aside)
    for path in (*sorted(aside.rglob("*")), aside):
        _fsync(path)
    while aside.exists():
        # Another name each time: what was there may be in the way of what is there now.
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.old")
        if target.is_dir():
            # Renamed first: a half-deleted directory must not pass for a whole one.
            with contextlib.suppress(FileNotFoundError):
                target.rename(old)
        try:
            aside.replace(target)
        except OSError as error:
            # Another writer's has just been put there.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.old"):
        remove(left)
    _fsync(target.parent)


def file_error(error: BaseException, target: Path) -> UserError | None:
    """The `UserError` for a failed write; None where the file system is not to blame.

    A full disk comes under whatever name: libraries report it as errors of their own kinds.
    """
    if isinstance(error, UserError):
        return error
    full = isinstance(error, Exception) and _is_full(target)
    if not (isinstance(error, OSError) or full):
        return None
    reason = getattr(error, "strerror", None) or "No space left on device"
    kind = StorageError if full or getattr(error, "errno", None) in OF_THE_DISK else UserError
    return kind(f"{target} cannot be written: {reason}")


@contextmanager
def _complete_or_absent(target: Path) -> Iterator[Path]:
    """A place beside ``target`` to write to, moved there at the end; nothing is left on errors."""
    aside = _own_aside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        yield aside
        put_in_place(aside, target)
    except BaseException as error:
        reported = file_error(error, target)
        remove(aside)
        if reported is None or reported is error:
            raise
        raise reported from error


def _is_full(path: Path) -> bool:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return shutil.disk_usage(folder).free < FULL


def remove(path: Path) -> None:
    """Deletes a file or a directory; nothing there is no error."""
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


def refuse_filled(output: Path) -> None:
    """Raises a `UserError` where ``output`` holds something."""
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise UserError(f"{output} exists and is not empty: choose another --output")
