"""`bov` commands, and functions of tests, in processes of their own that need not import torch.

A server, one for each process of pytest, imports everything (torch, Lightning, lm-eval, this
package) and then only forks: every command is a real process with its own process group, signal
handlers, files and exit code, which runs what ``python -m bov_lightning.cli`` would. Only what
packages read from the environment when they are imported is the server's. A command
that ends by `sys.exit` has its threads awaited, its exit functions called and its output written,
as any interpreter does; that the memory of a fork is given back piece by piece (a third of a
second) is left to the system.

Where several processes run the tests (pytest -n), they are forks of one such process themselves,
each with a server that was forked from it before it ran any test (`WORKER`).
"""

import atexit
import contextlib
import gc
import importlib
import os
import pickle
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch", "torch.distributed.checkpoint", "torch.distributed.elastic.multiprocessing",
    "torch.distributed.fsdp", "torch.distributed.tensor.debug", "torch.nn.attention.flex_attention",
    "torch.utils.tensorboard", "lightning.pytorch.cli", "lm_eval.evaluator",
    "lm_eval.models.huggingface", "lm_eval.tasks", "transformers.generation.utils", "tokenizers",
    "datasets", "pyarrow.parquet", "safetensors.torch", "rich.live", "rich.progress",
    "rich.status", "concurrent.futures.process", "multiprocessing.heap",
    "multiprocessing.popen_fork", "multiprocessing.popen_spawn_posix",
    "multiprocessing.synchronize", "attr", "pytest", "bov_lightning.cli.commands",
    "bov_lightning.training.fit", "data_modules.packed", "data_modules.streaming",
    "evaluation.callback", "evaluation.command",
)  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
PROGRAMS = ("bov_lightning.cli", "bov_lightning.cli.__main__")
WORKER = "--worker"
"""``python -S forks.py --worker SOCKET -u -c CODE`` does in a fork what ``python -c CODE`` does."""


class Fork:
    """A process that runs; used as `subprocess.Popen` is.

    Args:
        args: what it runs, for messages.
        request: what the server is told of that.
        cwd: its directory; the current one if not given.
        env: its environment; the current one if not given.
        stdin: a file or descriptor; empty if not given.
        stdout: a file or descriptor; if not given `out` reads it, at any time.
        stderr: likewise, with `err`; `subprocess.STDOUT` means stdout's.
        pass_fds: descriptors that it keeps open, under whatever number.
        start_new_session: if not, it belongs to the process group of who starts it.
    """

    def __init__(
        self, args: Any, request: dict[str, Any], *, cwd: Path | None = None,
        env: dict[str, str] | None = None, stdin=None, stdout=None, stderr=None,
        pass_fds: tuple[int, ...] = (), start_new_session: bool = True,
    ):  # fmt: skip
        self.args = args
        self.returncode: int | None = None
        self._is_leader = start_new_session
        self._kept = [
            tempfile.TemporaryFile() if file is None else None  # noqa: SIM115
            for file in (stdout, stderr)
        ]
        stdout = self._kept[0] or stdout
        stderr = self._kept[1] or (stdout if stderr == subprocess.STDOUT else stderr)
        request |= {
            "cwd": str(cwd or Path.cwd()), "start_new_session": start_new_session,
            "environment": dict(os.environ if env is None else env),
        }  # fmt: skip
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(os.devnull, "rb") as empty:
            files = (theirs, empty if stdin is None else stdin, stdout, stderr, *pass_fds)
            rights = [file if isinstance(file, int) else file.fileno() for file in files]
            socket.send_fds(_get_server(), [pickle.dumps(request)], rights)
        self.pid = int(self._status.recv(32))

    def fileno(self) -> int:
        """Of what becomes readable when it ends; not after `poll` has told."""
        return self._status.fileno()

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.recv(32))
            self._status.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; negative for a signal."""
        if self.returncode is None:
            select.select([self._status], [], [], timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, input: None = None, timeout: float | None = None) -> tuple:
        """Waits; stdout and stderr, where it was not given a file for them."""
        self.wait(timeout)
        return tuple(self._read(i) if self._kept[i] else None for i in (0, 1))

    def send_signal(self, number: int) -> None:
        """To the process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, to its whole process group if it has one of its own."""
        if self.poll() is None:
            (os.killpg if self._is_leader else os.kill)(self.pid, signal.SIGKILL)

    @property
    def out(self) -> str:
        """What it has written to stdout so far."""
        return self._read(0)

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        return self._read(1)

    def _read(self, which: int) -> str:
        file = self._kept[which].fileno()
        # The position in the file is the process's.
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.kill()
        self.wait()
        for file in filter(None, self._kept):
            file.close()


class Bov(Fork):
    """A `bov` command that runs.

    Args:
        arguments: what follows `bov`.
        fork_children: `bov` commands that it starts itself (ranks, runs of a sweep) are forked as
            well, from what it was before it did anything.
        options: as in `Fork`.
    """

    def __init__(self, *arguments: Any, fork_children: bool = False, **options):
        args = ["bov", *map(str, arguments)]
        super().__init__(args, {"arguments": args[1:], "fork_children": fork_children}, **options)


class Call(Fork):
    """A function of a test's module that runs; it ends with 1, and a traceback, where it raises."""

    def __init__(self, function: Callable, *arguments: Any, **options):
        pickled = pickle.dumps((function, arguments))
        super().__init__(function, {"call": pickled, "path": sys.path}, **options)


def bov(*arguments: Any, check: bool = False, **options) -> subprocess.CompletedProcess:
    """Runs a command to its end, as `subprocess.run` does with `capture_output`."""
    with Bov(*arguments, **options) as process:
        out, err = process.communicate()
    assert not check or process.returncode == 0, f"{process.args}: {process.returncode}\n{err}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextlib.contextmanager
def workers() -> Iterator[str]:
    """A server of processes that run tests; what to call in place of Python to get one."""
    with (
        tempfile.TemporaryDirectory(prefix="forks-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
    ):
        address = os.path.join(folder, "socket")
        listener.bind(address)
        listener.listen(100)
        process = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())], pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            yield shlex.join([sys.executable, "-S", __file__, WORKER, address])
        finally:
            process.kill()
            process.wait()


servers: set[int] = set()
"""Process numbers of what serves all tests of this process."""
_server: socket.socket | None = None
_environment = dict(os.environ)
_processes: list[subprocess.Popen] = []  # kept, since nobody waits for their ends


def _get_server() -> socket.socket:
    """The server, started by whoever needs it first."""
    global _server
    if _server is None:
        _server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, start_new_session=True, env=_environment,
            )  # fmt: skip
        _processes.append(process)
        servers.add(process.pid)
    return _server


class _Popen(subprocess.Popen):
    """Takes the place of `subprocess.Popen` in a command whose children are to be forked."""

    def __new__(cls, command, **options):
        if isinstance(command, str) or command[:2] != [sys.executable, "-m"]:
            return super().__new__(cls)
        if command[2] not in PROGRAMS:
            return super().__new__(cls)
        given = {"stdin": 0, "stdout": 1, "stderr": 2, "start_new_session": False} | options
        assert set(given) <= {"stdin", "stdout", "stderr", "start_new_session", "env", "cwd",
                              "pass_fds"}  # fmt: skip
        if given["stdin"] == subprocess.DEVNULL:
            given["stdin"] = None
        return Bov(*command[3:], fork_children=True, **given)


def _serve(control: socket.socket, of_tests: bool) -> dict[str, Any]:
    """Answers requests until nobody can ask any more; returns one in the process that it is for.

    What has not ended by then is killed if it was for tests; what a command started may go on.
    """
    global _server
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while control.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        # Whoever connects has a server to themselves.
        connection, _ = control.accept()
        if os.fork() == 0:
            control.close()
            control = connection
        else:
            connection.close()
    statuses: dict[int, int] = {}  # of each command: who wants to know of its end
    ends, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    while True:
        ready, _, _ = select.select([control, ends], [], [])
        if ends in ready:
            ends.recv(1000)
            _tell(statuses)
        if control not in ready:
            continue
        message, files, _, _ = socket.recv_fds(control, 2**20, 100)
        if not message:
            for pid in statuses if of_tests else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os._exit(0)
        request = pickle.loads(message)
        if (pid := os.fork()) == 0:
            break
        statuses[pid] = files.pop(0)
        for file in files:
            os.close(file)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for kept in (control, ends, wake):
        kept.close()
    for file in statuses.values():
        os.close(file)
    if request["start_new_session"]:
        os.setsid()
    if request.get("fork_children"):
        _server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if (pid := os.fork()) == 0:
            _server.close()
            for file in files:
                os.close(file)
            return _serve(theirs, of_tests="code" in request)
        theirs.close()
        servers.add(pid)
    status, *standard = files[:4]
    for target, file in enumerate(standard):
        os.dup2(file, target)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    # What an interpreter decides when it starts.
    for number in (1, 2):
        old = (sys.stdout, sys.stderr)[number - 1]
        made = open(  # noqa: SIM115 (until the process ends)
            number, "w", closefd=False, encoding=old.encoding, errors=old.errors,
            buffering=1 if number == 2 or os.isatty(1) else -1,
        )  # fmt: skip
        setattr(sys, ("stdout", "stderr")[number - 1], made)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # What a console decides when it is made: where it writes to, and in which colours.
    kept = console.CONSOLE
    importlib.reload(console)
    vars(kept).update(vars(console.CONSOLE))
    console.CONSOLE = kept
    os.write(status, b"%d" % os.getpid())
    for file in files[:4]:
        os.close(file)
    return request


def _tell(statuses: dict[int, int]) -> None:
    """Those who wait for processes that have ended."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if (file := statuses.pop(ended[0], None)) is not None:
                with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
                    os.write(file, b"%d" % os.waitstatus_to_exitcode(ended[1]))
                os.close(file)


def _import() -> None:
    """Imports what all forks have then; nothing of it is garbage, which takes long to find out."""
    gc.disable()
    for name in PRELOADED:
        importlib.import_module(name)
    gc.enable()
    gc.freeze()


def _run(request: dict[str, Any]) -> None:
    """Does what is asked for, and ends as an interpreter does."""
    if "call" in request:
        sys.path[:] = request["path"]
        function, arguments = pickle.loads(request["call"])
        function(*arguments)
        sys.exit(0)
    if "code" in request:
        # What imports this module finds it with its server.
        sys.modules["forks"] = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        sys.path[0], sys.argv = "", ["-c"]
        exec(request["code"], sys.modules["__main__"].__dict__)
        sys.exit(0)
    if request["fork_children"]:
        subprocess.Popen = _Popen
    sys.path[0] = request["cwd"]
    sys.argv[1:] = request["arguments"]
    runpy.run_module("bov_lightning.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if sys.argv[1] == WORKER:
        _server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _server.connect(sys.argv[2])
        request = {"code": sys.argv[-1], "fork_children": True}
        worker = Fork(sys.argv, request, stdin=0, stdout=1, stderr=2)
        signal.signal(signal.SIGINT, lambda *_: worker.send_signal(signal.SIGINT))
        sys.exit(worker.wait())
    _import()
    from bov_lightning import console

    request = _serve(socket.socket(fileno=int(sys.argv[1])), of_tests=True)
    try:
        _run(request)
    except SystemExit as end:
        if not isinstance(end.code, int):  # words for stderr, or none
            raise
        code = end.code & 0xFF
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # nobody reads it any more
                code = 120
        os._exit(code)
