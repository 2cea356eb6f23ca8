"""Who evaluates which step: files that only one process can create.

A claim is RUN/eval/claims/NAME.GENERATION. Creating a file that must not exist is atomic, on local
and on shared file systems. The owner touches its file. One that has not been touched for a while,
or whose process is gone, is dead, and whoever creates the next generation takes over.
"""

import hashlib
import json
import os
import socket
import threading
import time
from pathlib import Path

from bov_lightning.checkpoint.directory import step_name
from bov_lightning.run.directory import EVAL

STALE_AFTER_S = 60.0
"""Without a sign of life for so long, an owner counts as dead."""


def of_step(run: Path, step: int, settings: dict) -> tuple[Path, str]:
    """Directory and name of a claim: the same for all who would evaluate a step in the same way."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return run / EVAL / "claims", f"{step_name(step)}-{digest[:12]}"


def _identity() -> dict[str, str | int]:
    """This process, unmistakably."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.is_file() else "",
        "namespace": os.readlink(namespace) if namespace.is_symlink() else "",
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(pid: int) -> str:
    """When a process began, so that another one of the same number is not taken for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
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
    """A step that this process evaluates; use it as a context."""

    def __init__(self, directory: Path, name: str, generation: int, stale_after_s: float):
        self.directory, self.name, self.generation = directory, name, generation
        self.path = _path(directory, name, generation)
        self._ended = threading.Event()
        self._beat = threading.Thread(
            target=self._keep_alive, args=(stale_after_s / 4,), daemon=True
        )

    def __enter__(self) -> "Claim":
        self._beat.start()
        return self

    def __exit__(self, *error) -> None:
        """Gives the claim up: results, if there are any, speak for themselves."""
        self._ended.set()
        self._beat.join()
        if self.is_mine():
            for generation in range(self.generation + 1):
                _path(self.directory, self.name, generation).unlink(missing_ok=True)

    def is_mine(self) -> bool:
        """Whether nobody took this process for dead in the meantime."""
        return _generations(self.directory, self.name)[-1:] == [self.generation]

    def _keep_alive(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                return


def _path(directory: Path, name: str, generation: int) -> Path:
    return directory / f"{name}.{generation}"


def _generations(directory: Path, name: str) -> list[int]:
    numbers = (path.name.rpartition(".")[2] for path in directory.glob(f"{name}.*"))
    return sorted(int(number) for number in numbers if number.isdigit())


def take(directory: Path, name: str, stale_after_s: float = STALE_AFTER_S) -> Claim | None:
    """The claim, or None while a living process holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    existing = _generations(directory, name)
    if existing and _is_alive(_path(directory, name, existing[-1]), stale_after_s):
        return None
    generation = existing[-1] + 1 if existing else 0
    # Linked rather than created: a claim must never be seen without its owner's name in it.
    written = directory / f".{name}-{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}"
    written.write_text(json.dumps(_identity()), encoding="utf-8")
    try:
        os.link(written, _path(directory, name, generation))
    except FileExistsError:
        return None
    finally:
        written.unlink()
    return Claim(directory, name, generation, stale_after_s)


def _is_alive(path: Path, stale_after_s: float) -> bool:
    try:
        owner, touched = json.loads(path.read_text(encoding="utf-8") or "{}"), path.stat().st_mtime
    except FileNotFoundError:
        return True  # given up this moment: the next look finds out
    except ValueError:
        owner, touched = {}, path.stat().st_mtime
    here = _identity()
    if owner and all(owner.get(k) == here[k] for k in ("host", "boot", "namespace")):
        return _is_running(owner["pid"]) and _started(owner["pid"]) == owner["started"]
    return _file_system_time(path.parent) - touched < stale_after_s


def _file_system_time(directory: Path) -> float:
    """Now, by the clock that stamps the files: machines' clocks differ."""
    probe = directory / f".clock-{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now
