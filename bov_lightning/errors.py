"""The exceptions of this project; `UserError` is for mistakes that the user can put right."""


class UserError(ValueError):
    """A mistake of the user's: one clear line that says what was wrong, where, and what to do.

    The ``bov`` command prints the line without a traceback and exits with code 2. It is a
    ``ValueError``, so that config dataclasses can raise it while they are being parsed.
    """


class EvaluationInterruptedError(Exception):
    """An evaluation was asked to stop; all ranks raise it after the same batch."""


class RankFailedError(RuntimeError):
    """Something failed on another rank, whose message it holds."""
