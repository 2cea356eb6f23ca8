"""The exceptions of this project; `UserError` is for mistakes that the user can put right."""


class UserError(ValueError):
    """A mistake of the user's: one clear line that says what was wrong, where, and what to do.

    The ``bov`` command prints the line without a traceback and exits with code 2. It is a
    ``ValueError``, so that config dataclasses can raise it while they are being parsed.
    """

    exit_code = 2
    """Of the command that it ends."""


class StorageError(UserError):
    """What a disk refuses though nothing is wrong with what was asked: it is full, or fails.

    Exit code 74 (EX_IOERR): the same command may succeed later, so that a job may be requeued.
    """

    exit_code = 74


class DivergedError(UserError):
    """A run whose gradients are not finite any more: more of the same will not help it."""


class EvaluationInterruptedError(Exception):
    """An evaluation was asked to stop; all ranks raise it after the same batch."""


class RankFailedError(RuntimeError):
    """Something failed on another rank, whose message it holds."""
