"""Who does something that only one process may do: files that only one process can create.

A claim is DIRECTORY/NAME.GENERATION. Creating a file that must not exist is atomic, on local and on
shared file systems, which need no locks for it. The owner touches its file. One whose process is
gone, or that has not been touched for a while, is dead, and whoever creates the next generation
takes over. Whether a file was touched is seen by watching it: no two machines' clocks are compared.
"""

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STALE_AFTER_S = 60.0
"""Without a sign of life for so long, an owner counts as dead."""

POLL_S = 0.5

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What file systems without hard links say."""


def identity() -> dict[str, Any]:
    """This process, unmistakably."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.is_file() else "",
        "namespace": os.readlink(namespace) if namespace.is_symlink() else "",
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "attempt": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _started(pid: int) -> str:
    """When a process began, so that another one of the same number is not taken for it.

    Empty where it cannot be told, and where it has ended and nobody has asked how yet.
    """
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if facts[0] in "ZX" else facts[19]
    except (OSError, IndexError):
        return ""


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Claim:
    """What this process alone may do now; use it as a context."""

    def __init__(
        self, directory: Path, name: str, generation: int, stale_after_s: float, token: str = ""
    ):
        self.directory, self.name, self.generation = directory, name, generation
        self.token = token
        self.path = _path(directory, name, generation)
        self._ended = threading.Event()
        self._beat = threading.Thread(
            target=self._keep_alive, args=(stale_after_s / 4,), daemon=True
        )

    def __enter__(self) -> "Claim":
        self._beat.start()
        return self

    def __exit__(self, *error) -> None:
        """Gives the claim up."""
        self._ended.set()
        self._beat.join()
        with contextlib.suppress(OSError):
            if self.is_mine():
                for generation in range(self.generation + 1):
                    _path(self.directory, self.name, generation).unlink(missing_ok=True)

    def is_mine(self) -> bool:
        """Whether nobody took this process for dead in the meantime, nor the directory away."""
        if _generations(self.directory, self.name)[-1:] != [self.generation]:
            return False
        try:
            return json.loads(self.path.read_text(encoding="utf-8")).get("token") == self.token
        except (OSError, ValueError, AttributeError):
            return False

    def follow(self, directory: Path) -> None:
        """The directory has been renamed to this."""
        self.directory = directory
        self.path = _path(directory, self.name, self.generation)

    def _keep_alive(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            # A directory that is not there just now may come back.
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _path(directory: Path, name: str, generation: int) -> Path:
    return directory / f"{name}.{generation}"


def _generations(directory: Path, name: str) -> list[int]:
    try:
        files = os.listdir(directory)
    except OSError:
        return []
    numbers = (file.removeprefix(f"{name}.") for file in files if file.startswith(f"{name}."))
    return sorted(int(number) for number in numbers if number.isdigit())


def take(directory: Path, name: str, stale_after_s: float = STALE_AFTER_S) -> Claim | None:
    """The claim, or None while a process holds it that lives as far as one look can tell."""
    directory.mkdir(parents=True, exist_ok=True)
    existing = _generations(directory, name)
    if existing and _is_alive(_path(directory, name, existing[-1]), stale_after_s):
        return None
    generation, token = existing[-1] + 1 if existing else 0, uuid.uuid4().hex
    owner = identity() | {"token": token, "since": datetime.now(UTC).isoformat(" ", "seconds")}
    try:
        _create(_path(directory, name, generation), json.dumps(owner))
    except FileExistsError:
        return None
    return Claim(directory, name, generation, stale_after_s, token)


def _create(path: Path, content: str) -> None:
    """A file with a content, which must not be there yet."""
    # Linked rather than created: a claim must never be seen without its owner's name in it.
    written = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        written.write_text(content, encoding="utf-8")
        try:
            os.link(written, path)
        except FileExistsError:
            # A network file system may have lost its answer to the first attempt, and repeated it.
            if written.stat().st_nlink != 2:
                raise
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            with open(path, "x", encoding="utf-8") as file:
                file.write(content)
    finally:
        written.unlink(missing_ok=True)


def wait_and_take(
    directory: Path, name: str, stale_after_s: float = STALE_AFTER_S,
    go_on: Callable[[dict[str, Any], bool], bool] = lambda owner, is_certain: True,
    stop: Callable[[], bool] = lambda: False, poll_s: float = POLL_S,
) -> Claim | None:  # fmt: skip
    """The claim, as soon as its owner gives it up or turns out to be dead.

    Args:
        directory: where it lies; made when missing.
        name: what is claimed.
        stale_after_s: seconds without a sign of life after which an owner counts as dead.
        go_on: told, at every look, of the owner, and whether it lives for certain; False ends the
            waiting.
        stop: asked at every look; True ends the waiting, too.
        poll_s: seconds between two looks.

    Returns:
        None: ``go_on`` or ``stop`` said so.
    """
    seen: tuple[int, int, float] | None = None
    while True:
        if (claim := take(directory, name, stale_after_s)) is not None:
            return claim
        path = newest(directory, name)
        owner, beat = look(path) if path else ({}, None)
        if path is not None and beat is not None:
            generation, now = int(path.name.rpartition(".")[2]), time.monotonic()
            if seen is None or seen[0] != generation:
                seen = (generation, beat, now)
            is_certain = _is_here(owner) or beat != seen[1]
            if not go_on(owner, is_certain):
                return None
            if beat != seen[1]:
                seen = (generation, beat, now)
            elif not _is_here(owner) and now - seen[2] > stale_after_s:
                # Whatever the clocks say: nobody has touched it while we watched.
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path, (0, 0))
        if stop():
            return None
        time.sleep(poll_s)


def owner_of(directory: Path, name: str) -> dict[str, Any] | None:
    """Who holds a claim and lives, as far as one look can tell; None: nobody."""
    path = newest(directory, name)
    if path is None or not _is_alive(path, STALE_AFTER_S):
        return None
    return look(path)[0]


def newest(directory: Path, name: str) -> Path | None:
    """The file of the last generation; None without one."""
    found = _generations(directory, name)
    return _path(directory, name, found[-1]) if found else None


def look(path: Path) -> tuple[dict[str, Any], int | None]:
    """The owner, {} if it cannot be read, and the last sign of life (None: it was given up)."""
    try:
        # Opening a file has a network file system ask for its times anew.
        text, beat = path.read_text(encoding="utf-8"), path.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    try:
        owner = json.loads(text or "{}")
    except ValueError:
        owner = {}
    return owner if isinstance(owner, dict) else {}, beat


def describe(owner: dict[str, Any]) -> str:
    """Who it is, for people."""
    if "pid" not in owner:
        return "another process"
    job = f", SLURM job {owner['job']}" if owner.get("job") else ""
    since = f", since {owner['since']}" if owner.get("since") else ""
    return f"process {owner['pid']} on {owner.get('host')}{job}{since}"


def _is_here(owner: dict[str, Any]) -> bool:
    """Whether the owner is a process that this machine knows."""
    here = identity()
    return bool(owner) and all(owner.get(k) == here[k] for k in ("host", "boot", "namespace"))


def _is_alive(path: Path, stale_after_s: float) -> bool:
    owner, beat = look(path)
    if beat is None:
        return True  # given up this moment: the next look finds out
    here = identity()
    if _is_here(owner):
        return _is_running(owner["pid"]) and _started(owner["pid"]) == owner["started"]
    if here["job"] and owner.get("job") == here["job"] and owner.get("attempt") != here["attempt"]:
        return False  # SLURM runs a job once at a time
    if beat == 0:
        return False
    return _file_system_time(path.parent) - beat / 1e9 < stale_after_s


def _file_system_time(directory: Path) -> float:
    """Now, by the clock that stamps the files: machines' clocks differ."""
    probe = directory / f".clock-{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()
