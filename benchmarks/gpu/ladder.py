"""Stage h: the ladder's rungs for a GPU, as far as time allows; what is left can go on elsewhere.

Where this version has `bov sweep --ladder`. In a dry run only the plan is made.
"""

import contextlib
import csv
import io
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from stage import Results, stage_parser
from text import options_of

FILE = Path(__file__).resolve().parent.parent.parent / "docs" / "results" / "ladder" / "ladder.yaml"
RUNGS = "1e15,1e16"
TO_SAVE_S = 30.0
"""Seconds for runs that are told to stop, and for the report."""


def has_ladders() -> bool:
    """Whether `bov sweep` has the option."""
    from bov_lightning.cli import main as bov

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        bov(["sweep", "--help"])
    return "--ladder" in said.getvalue()


def main() -> int:
    """Trains; the command's exit code."""
    parser = stage_parser(__doc__)
    parser.add_argument("--text", type=Path, help="a folder of train-* and val-* files")
    parser.add_argument("--seconds", type=float, required=True, help="when to have stopped")
    options = parser.parse_args()
    results = Results(options.output)
    if not FILE.is_file() or not has_ladders():
        results.keep(left_out="no bov sweep --ladder here")
        return 0
    folder = options.output.with_suffix("")
    home = folder / "home"
    home.mkdir(parents=True)
    words = ["sweep", "--ladder", str(FILE), "--rungs", RUNGS, "--output", str(home),
             "--run.root", str(folder / "runs"), "--data.init_args.directory",
             str(folder / "data")]  # fmt: skip
    words += options_of(options.text, folder / "text", megabytes=0.2 if options.toy else 30)
    if options.toy:
        words += ["--dry-run", "--flops-per-second", "1e9"]
    else:
        seconds = max(1.0, options.seconds - TO_SAVE_S)
        words += ["--trainer.accelerator", "gpu", "--jobs", "4", "--time-limit", f"{seconds:.0f}"]
    code = subprocess.run([sys.executable, "-m", "bov_lightning.cli", *words]).returncode
    runs = home / "runs.csv"
    rows = list(csv.DictReader(io.StringIO(runs.read_text()))) if runs.is_file() else []
    results.keep(runs=rows, summary="planned" if options.toy else f"{len(rows)} runs finished")
    return code


if __name__ == "__main__":
    sys.exit(main())
