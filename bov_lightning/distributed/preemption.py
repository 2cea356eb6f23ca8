"""Being told to stop: a signal only sets a flag, which is acted upon at the next step boundary.

SIGUSR1 means that the time limit is near: save, exit with 75, requeue me. SIGTERM means that
somebody else decides (scancel, preemption, scontrol requeue): save, exit with 143. SIGHUP, a
terminal that was closed, counts as SIGTERM, unless it is ignored (nohup). While a run trains,
Ctrl-C is one of them, too: save, exit with 130; a second one does not wait for the step. The first
signal counts; later ones, and those that come when training has ended, change nothing.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

REQUEUE = 75
"""Exit code (EX_TEMPFAIL) that asks the batch script for a requeue."""
STOPPED = 143
"""Exit code (128 + SIGTERM) that asks for nothing."""
INTERRUPTED = 130
"""Exit code (128 + SIGINT) of Ctrl-C."""

_CODES = {signal.SIGUSR1: REQUEUE, signal.SIGTERM: STOPPED, signal.SIGHUP: STOPPED}
_received: list[tuple[int, int]] = []
"""Exit code and number of the first signal."""


class Preempted(SystemExit):
    """Ends a process that was told to stop, after it has saved."""


def install() -> None:
    """Sets the handlers; called before anything heavy is imported, since signals do not wait."""
    for number in _CODES:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)


def _handle(number: int, frame) -> None:
    if number == signal.SIGHUP:
        _let_go_of_terminal()
    if not _received:
        _received.append((_CODES[number], number))


def _let_go_of_terminal() -> None:
    """A terminal that is gone must not make every line an error."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def received() -> int:
    """The exit code that the first signal asks for; 0 without one."""
    return _received[0][0] if _received else 0


def reason(code: int) -> str:
    """What the exit code means, for people; the signal may have reached another rank alone."""
    if _received and _received[0] == (code, signal.SIGHUP):
        return "SIGHUP"
    return {REQUEUE: "time limit", STOPPED: "SIGTERM", INTERRUPTED: "Ctrl-C"}[code]


@contextlib.contextmanager
def gentle_interrupt(trains: Callable[[], bool]) -> Iterator[None]:
    """The first Ctrl-C is noted as other signals are; the second one is a `KeyboardInterrupt`,
    as it always is before ``trains`` is true.

    Only where Python's own handler is in place: neither another's nor an ignored signal (a job in
    the background) is touched, and nothing happens outside of the main thread.
    """

    def handle(number: int, frame) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if _received or not trains():
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):
            os.write(2, b"\nfinishing the step and saving it (Ctrl-C again does not wait)\n")
        _received.append((INTERRUPTED, number))

    try:
        ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if ours:
            signal.signal(signal.SIGINT, handle)
    except ValueError:  # another thread's business
        ours = False
    try:
        yield
    finally:
        if ours:
            if signal.getsignal(signal.SIGINT) is handle:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            if _received and _received[0][0] == INTERRUPTED:
                _received.clear()


def ignore() -> None:
    """For the end: an interpreter that shuts down puts the default handlers back, which kill it."""
    for number in (*_CODES, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
