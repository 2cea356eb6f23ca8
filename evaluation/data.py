"""The task files: where they lie, whether they are intact, and how they are fetched when asked."""

import fcntl
import hashlib
import json
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bov_lightning.errors import UserError
from bov_lightning.files import write_file
from bov_lightning.kinds import home
from bov_lightning.text import decode, lines

VARIABLE = "BOV_EVAL_DATA"
BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
"""The public bundle of the CORE files; BOV_EVAL_URL names a mirror."""
BLOCK = 2**20


def default_directory() -> Path:
    """Where files go that are downloaded without a --data-dir."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "bov-lightning" / "eval_bundle"


def data_directory(given: str | Path | None) -> Path:
    """The directory given, else that of BOV_EVAL_DATA, else the one that downloads go to."""
    return Path(home(str(given or os.environ.get(VARIABLE) or default_directory())))


def find_file(directory: Path, name: str) -> Path | None:
    """The file in any of the layouts that the bundle is unpacked to."""
    for folder in ("eval_data", "eval_bundle/eval_data", "."):
        if (path := directory / folder / name).is_file():
            return path
    return None


def read_rows(given: str | Path | None, file: str, sha256: str | None) -> list[dict]:
    """The rows of a task file.

    Args:
        given: the data directory, if one was named.
        file: the path below it.
        sha256: what the file's content must hash to; None: anything.

    Raises:
        UserError: no such file, or another content than the one that scores are comparable on.
    """
    directory = data_directory(given)
    path = find_file(directory, file)
    if path is None:
        raise UserError(
            f"{directory} holds no {file}: unpack the CORE eval_bundle there, name its directory "
            f"with --data-dir or {VARIABLE}, or let --download fetch it"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"{path} is truncated or altered (its sha256 is not {sha256[:12]}...): replace it, "
            "scores on it would compare with nothing"
        )
    try:
        return [json.loads(line) for line in lines(decode(content)) if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} is no JSONL file: {error}") from error


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process that holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".download.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def download(
    given: str | Path | None,
    checksums: dict[str, str],
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Fetches what is missing of the files; continues an interrupted transfer.

    Any number of processes may call it at once: one downloads, the others wait for it.

    Args:
        given: the data directory, if one was named.
        checksums: sha256 of every file, by its path.
        report: takes lines about the progress.

    Returns:
        The data directory.

    Raises:
        UserError: no connection, or files that are not the expected ones.
    """
    directory = data_directory(given)
    with _locked(directory):
        missing = {n: s for n, s in checksums.items() if find_file(directory, n) is None}
        if not missing:
            return directory
        archive = directory / ".eval_bundle.zip.partial"
        url = os.environ.get("BOV_EVAL_URL", BUNDLE_URL)
        _fetch(url, archive, report)
        try:
            with zipfile.ZipFile(archive) as bundle:
                _unpack(bundle, missing, directory)
        except zipfile.BadZipFile as error:
            archive.unlink(missing_ok=True)
            raise UserError(f"{url} gave no zip file: call again, or unpack it yourself") from error
        archive.unlink()
    return directory


def _unpack(bundle: zipfile.ZipFile, wanted: dict[str, str], directory: Path) -> None:
    members = {name.partition("eval_data/")[2]: name for name in bundle.namelist()}
    for name, sha256 in wanted.items():
        content = bundle.read(members[name]) if name in members else b""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"the downloaded bundle has another {name} than the one expected")
        write_file(directory / "eval_data" / name, lambda file, c=content: file.write(c))


def _fetch(url: str, target: Path, report: Callable[[str], None]) -> None:
    start = target.stat().st_size if target.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            resumed = response.status == 206
            done = start if resumed else 0
            total = done + int(response.headers.get("Content-Length") or 0)
            with open(target, "ab" if resumed else "wb") as file:
                while block := response.read(BLOCK):
                    file.write(block)
                    if (done + len(block)) // (8 * BLOCK) > done // (8 * BLOCK):
                        report(f"downloading {url}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")
                    done += len(block)
        if done < total:
            raise UserError(f"{url}: the connection ended early; the same command continues")
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            return  # nothing is left to fetch
        raise UserError(f"{url} cannot be downloaded: {error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{url} cannot be downloaded ({reason}): put the unpacked eval_bundle into "
            f"{target.parent} yourself"
        ) from error
