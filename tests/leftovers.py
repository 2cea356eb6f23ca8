"""Nothing that a test starts outlives it, however the test ends."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from forks import servers

PR_SET_CHILD_SUBREAPER = 36
"""From <sys/prctl.h>: processes whose parent has ended become children of this one."""

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[psutil.Process]:
    """All living processes that this one, or what it started, has started."""
    if not CHILDREN_ARE_LISTED:
        return psutil.Process().children(recursive=True)
    found, pending = [], [os.getpid()]
    while pending:
        for child in children_of(pending.pop()):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(child))
                pending.append(child)
    return found


CHILDREN_ARE_LISTED = Path(f"/proc/self/task/{os.getpid()}/children").exists()
"""By Linux: psutil looks at every process of the machine, which costs milliseconds twice a test."""


def children_of(process: int) -> list[int]:
    """The process numbers of all children, which belong to the threads that started them."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, (thread / "children").read_text().split())
    return found


def is_server(process: psutil.Process) -> bool:
    """Whether it serves all tests; one that is gone does not."""
    with contextlib.suppress(psutil.Error):
        return process.pid in servers or (
            "multiprocessing.resource_tracker" in " ".join(process.cmdline())
            and process.ppid() == os.getpid()
        )
    return False


@pytest.fixture(autouse=True)
def no_process_left(request) -> Iterator[None]:
    """Kills what the test has left running, a test that ran out of time above all.

    A SLURM cluster starts daemons of its own when it likes, and ends with its fixture.
    """
    before = set(descendants())
    yield
    if "slurm" in request.keywords:
        return
    left = [
        process for process in descendants() if process not in before and not is_server(process)
    ]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)
