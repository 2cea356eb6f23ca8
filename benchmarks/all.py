"""All benchmarks, on fewer rows where all would take long: under 10 minutes on 2 cores.

    python benchmarks/all.py [NAME ...]

Each result goes to benchmarks/results/NAME.json and is compared with the one that was there: ratio
by ratio, since what is compared ran in turns within one process. Times of two machines, or of two
days, say little.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
ARGUMENTS = {
    "startup": "--repeats 3",
    "train": "--repeats 3 --only llama standard fit memory --accumulate 2",
    "decode": "--context 1024 8192 --batch 1 --repeats 5",
    "data": "--repeats 3 --vocab-size 4096 --sequence-len 256",
    "checkpoint": "--repeats 3",
    "core": "--rows 8 --suite-rows 5 --repeats 3",
}
"""Benchmarks and what they are run with."""
NOTEWORTHY = 0.1
"""Relative difference of a ratio from which it is marked."""


def measure(name: str) -> dict | None:
    """The JSON object of a benchmark's last line; None where it fails, with its last lines."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *ARGUMENTS[name].split()]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    printed = done.stdout.strip()
    if done.returncode or not printed:
        print(f"{name} failed (exit code {done.returncode}):", file=sys.stderr)
        print("\n".join(done.stderr.strip().split("\n")[-5:]), file=sys.stderr)
        return None
    return json.loads(printed.rpartition("\n")[2])


def compare(name: str, now: dict, stored: dict | None) -> None:
    """Prints the ratios of a result beside the stored ones."""
    before = {} if stored is None else stored["ratios"]
    if stored is not None:
        print(f"  stored: {stored['commit']} on {stored['machine']}")
    for key, value in now["ratios"].items():
        line = f"  {key:44} {value:8.3f}"
        if before.get(key):
            change = value / before[key] - 1
            mark = "  <--" if abs(change) > NOTEWORTHY else ""
            line += f"   stored {before[key]:8.3f}   {change:+.1%}{mark}"
        print(line)


def main() -> int:
    """Measures, compares and stores; 1 where a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ARGUMENTS))
    names = parser.parse_args().names or list(ARGUMENTS)
    unknown = set(names) - set(ARGUMENTS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: use {', '.join(ARGUMENTS)}")
    RESULTS.mkdir(exist_ok=True)
    failed = 0
    for name in names:
        started = time.monotonic()
        print(f"{name} {ARGUMENTS[name]}", flush=True)
        result = measure(name)
        if result is None:
            failed = 1
            continue
        path = RESULTS / f"{name}.json"
        compare(name, result, json.loads(path.read_text()) if path.is_file() else None)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"  {time.monotonic() - started:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
