"""Being told to stop: a signal only sets a flag, which is acted upon at the next step boundary.

SIGUSR1 means that the time limit is near: save, exit with 75, requeue me. SIGTERM means that
somebody else decides (scancel, preemption, scontrol requeue): save, exit with 143. The first signal
counts; later ones, and those that come when training has ended, change nothing.
"""

import signal

REQUEUE = 75
"""Exit code (EX_TEMPFAIL) that asks the batch script for a requeue."""
STOPPED = 143
"""Exit code (128 + SIGTERM) that asks for nothing."""

_CODES = {signal.SIGUSR1: REQUEUE, signal.SIGTERM: STOPPED}
_received: list[int] = []


class Preempted(SystemExit):
    """Ends a process that was told to stop, after it has saved."""


def install() -> None:
    """Sets the handlers; called before anything heavy is imported, since signals do not wait."""
    for number in _CODES:
        signal.signal(number, _handle)


def _handle(number: int, frame) -> None:
    if not _received:
        _received.append(_CODES[number])


def received() -> int:
    """The exit code that the first signal asks for; 0 without one."""
    return _received[0] if _received else 0


def ignore() -> None:
    """For the end: an interpreter that shuts down puts the default handlers back, which kill it."""
    for number in _CODES:
        signal.signal(number, signal.SIG_IGN)
