"""Stage b: the tests of `make gpu-check`.

python benchmarks/gpu/checks.py --output FILE [TEST ...]
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from stage import Results, stage_parser

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def marked_files() -> list[str]:
    """The files that have such tests: others may need packages that a GPU machine lacks."""
    files = sorted((CHECKOUT / "tests").rglob("test_*.py"))
    return [str(path) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


class Counts:
    """Counts outcomes as they come."""

    def __init__(self, results: Results):
        self.results, self.failures = results, []
        self.n = dict.fromkeys(("passed", "failed", "skipped"), 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """What pytest calls for each phase of each test."""
        if report.when != "call" and report.passed:
            return
        self.n[report.outcome] += 1
        if report.failed:
            self.failures.append(report.nodeid)
        self.results.keep(summary=", ".join(f"{n} {outcome}" for outcome, n in self.n.items()),
                          failures=self.failures)  # fmt: skip


def main() -> int:
    """Runs them; pytest's exit code."""
    parser = stage_parser(__doc__)
    parser.add_argument("tests", nargs="*", help="files; all that have such tests")
    options = parser.parse_args()
    if options.device == "cuda":
        os.environ["BOV_REQUIRE"] = "gpu"
    arguments = ["-m", "gpu", "-q", "--durations=10", "-p", "no:cacheprovider"]
    return pytest.main(
        [*arguments, *(options.tests or marked_files())], [Counts(Results(options.output))]
    )


if __name__ == "__main__":
    sys.exit(main())
