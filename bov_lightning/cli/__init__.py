"""The `bov` command. Imports what a command needs only when that command runs."""

import contextlib
import errno
import gc
import os
import sys
import traceback

from bov_lightning.cli.commands import COMMANDS
from bov_lightning.errors import StorageError, UserError
from bov_lightning.files import OF_THE_DISK
from bov_lightning.text import NoTextError, check, print_any_text

USAGE = """\
usage: bov COMMAND ...

  fit        train a recipe, or continue its run       bov fit --config recipes/quickstart.yaml
  prepare    tokenize and pack a recipe's text         bov prepare --config R.yaml
  validate   measure bits per byte                     bov validate RUN-or-CHECKPOINT
  plan       parameters, FLOPs, memory, before paying  bov plan --config R.yaml [--inference]
  submit     train on a SLURM cluster                  bov submit --config R.yaml --nodes N ...
  sweep      compare value sources at equal FLOPs      bov sweep --config R.yaml --values ...
  evaluate   benchmarks: CORE, or any of lm-eval's    bov evaluate RUN-or-CHECKPOINT --data-dir D
  probe      which layers need context in values       bov probe MODEL --data FILES
  report     curves and tables of runs, as a page      bov report RUN ... --output report.html
  generate   sample text                               bov generate RUN-or-CHECKPOINT --prompt P
  serve      answer requests, by vLLM                   bov serve RUN-or-CHECKPOINT
  export     write a Hugging Face directory            bov export RUN-or-CHECKPOINT --output D
  import     read the paper's authors' checkpoints     bov import nanochat DIR --output D
  recipes    list the recipes that come with bov

Recipes are YAML files; several --config overlay each other, and --key.of.recipe VALUE overrides
both. bov COMMAND --help says more.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    0; 2 for the user's mistakes; 74 for a disk that is full or fails; 75 and 143 for a run that a
    signal stopped; 130 for Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    print_any_text()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        from bov_lightning.version import __version__

        print(f"bov-lightning {__version__}")
        return 0
    from bov_lightning.distributed.preemption import Preempted

    try:
        _check_text(arguments)
        if arguments[0] not in COMMANDS:
            import difflib

            close = difflib.get_close_matches(arguments[0], COMMANDS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "bov --help lists them"
            raise UserError(f"unknown command {arguments[0]!r}: {hint}")
        COMMANDS[arguments[0]](arguments[1:])
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except Preempted as preempted:
        return preempted.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (*OF_THE_DISK, errno.EACCES, errno.EROFS):
            raise
        kind = StorageError if error.errno in OF_THE_DISK else UserError
        message = f"{error.filename or 'the file system'}: {error.strerror}"
        return _fail(message, kind.exit_code)
    except Exception as error:
        if not _is_recipes_fault(error):
            raise
        return _fail(str(error), UserError.exit_code)
    return 0


def _check_text(arguments: list[str]) -> None:
    """Refuses what no text can be made of: Python reads such bytes as halves of characters."""
    named = [("argument", argument) for argument in arguments]
    with contextlib.suppress(OSError):  # The folder is gone: whoever needs it says so.
        named.append(("working folder", os.getcwd()))
    for what, text in named:
        try:
            check(text)
        except NoTextError:
            advice = "is not valid UTF-8: give it as UTF-8, or in a file"
            if what != "argument":
                advice = "has a name that is not valid UTF-8: rename it"
            with contextlib.suppress(UnicodeError):
                os.fsencode(text).decode("utf-8")
                advice = "cannot be read in this locale: set LC_ALL=C.UTF-8"
            raise UserError(f"the {what} {text!r} {advice}") from None


def _is_recipes_fault(error: Exception) -> bool:
    """Whether Lightning says that a recipe asks it, or one of its callbacks, for the impossible.

    Told by names, since Lightning takes seconds to import.
    """
    if type(error).__name__ == "MisconfigurationException":
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    where = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return type(error) is RuntimeError and where.startswith("lightning.pytorch.callbacks.")


def _fail(message: str, code: int) -> int:
    print(f"bov: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def entry_point() -> None:
    """The console script."""
    # Imports make objects by the hundred thousand, and all of them stay: to look for garbage after
    # every 700 takes a tenth of the time to the first step.
    gc.set_threshold(10_000)
    if sys.argv[1:2] != ["fit"]:
        sys.exit(main())
    from bov_lightning.distributed import preemption

    preemption.install()
    try:
        code = main()
    finally:
        preemption.ignore()
    sys.exit(code)
