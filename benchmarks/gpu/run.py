"""Runs the stages one after the other and prints a table: README.md.

Every stage is a process of its own with a time limit and a log. It writes what it finds to a JSON
file as it goes, so that one which is ended keeps what it has measured by then.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from table import ROWS, table

FOLDER = Path(__file__).resolve().parent
CHECKOUT = FOLDER.parent.parent
WHEELS = CHECKOUT / "gpu-wheels"
SITE = CHECKOUT / "build" / "gpu-site"
TOY_TITLE = "A dry run: toy sizes on a CPU, whose numbers say nothing of a GPU.\n"


@dataclass(frozen=True)
class Stage:
    """One part of the whole."""

    name: str
    share: int
    """Of the time: what a stage leaves over is shared among those that follow."""
    script: str
    arguments: tuple[str, ...] = ()
    toy: tuple[str, ...] = ("--toy",)
    """What makes it small enough for a CPU."""
    text: bool = False
    """Whether it reads --text."""
    stops_itself: bool = False
    """Whether it is told how long it may take, so as to save what it has."""


STAGES = {
    "a": Stage("environment", 1, "gpu/environment.py"),
    "b": Stage("tests", 4, "gpu/checks.py", toy=("tests/model/test_loss.py",)),
    "c": Stage("journey", 4, "gpu/journey.py", text=True),
    "d": Stage("training", 9, "gpu/training.py"),
    "e": Stage(
        "decoding", 4, "decode.py",
        ("--dtype", "bfloat16", "--batch", "1", "32", "--repeats", "5", "--memory-gb", "60",
         "--llama-batch", "1", "32", "--llama-repeats", "1"),
        ("--toy", "--dtype", "bfloat16", "--batch", "1", "32", "--repeats", "1", "--memory-gb",
         "0.4", "--llama-batch", "1", "32"),
    ),
    "f": Stage("save", 3, "checkpoint.py", ("--recipe", "bov-780m", "--repeats", "1"),
               ("--recipe", "quickstart", "--repeats", "1")),
    "g": Stage("fp8", 1, "gpu/training.py", ("--only", "fp8"), ("--toy", "--only", "fp8")),
    "h": Stage("ladder", 2, "gpu/ladder.py", text=True, stops_itself=True),
}  # fmt: skip


@dataclass
class Outcome:
    """What came of a stage."""

    status: str
    seconds: float = 0.0
    limit: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)


def limits(stages: list[str], seconds: float) -> float:
    """Seconds that the first of ``stages`` may take: its share of what is left for them all."""
    return seconds * STAGES[stages[0]].share / sum(STAGES[letter].share for letter in stages)


def command(letter: str, options: argparse.Namespace, result: Path, seconds: float) -> list[str]:
    """Of one stage's process, which may take so many seconds."""
    stage = STAGES[letter]
    words = [sys.executable, str(FOLDER.parent / stage.script), "--output", str(result)]
    words += ["--device", "cpu" if options.dry_run else "cuda"]
    words += stage.toy if options.dry_run else stage.arguments
    if stage.text and options.text:
        words += ["--text", str(options.text.resolve())]
    if stage.stops_itself:
        words += ["--seconds", f"{seconds:.0f}"]
    return words


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Of every stage: this checkout and the wheels first, no network, no GPU in a dry run."""
    paths = (str(CHECKOUT), str(SITE), os.environ.get("PYTHONPATH", ""))
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_WAIT_POLICY": "passive",
        # A second call on the same machine compiles less.
        "TORCHINDUCTOR_CACHE_DIR": str(CHECKOUT / "build" / "gpu-inductor"),
        **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
    }
    if (CHECKOUT / "shared" / "parity").is_dir():
        found["BOV_SHARED"] = str(CHECKOUT / "shared")
    if options.dry_run:
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def install_wheels(log: Path) -> None:
    """Unpacks gpu-wheels/ beside the checkout's own packages, once; without it nothing."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    stamp, names = SITE / "wheels.txt", "\n".join(wheels)
    if not wheels or (stamp.is_file() and stamp.read_text() == names):
        return
    shutil.rmtree(SITE, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
    with open(log, "w") as file:
        subprocess.run([*pip, "--target", str(SITE), *wheels], stdout=file, stderr=file, check=True)
    stamp.write_text(names)


def run_stage(
    words: list[str], log: Path, result: Path, seconds: float, variables: dict[str, str]
) -> Outcome:
    """One stage in a process group of its own, of which nothing is left afterwards."""
    started = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(
            words, cwd=CHECKOUT, env=variables, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
            status = "ok" if code == 0 else f"failed (exit code {code})"
        except subprocess.TimeoutExpired:
            status = f"out of time ({seconds:.0f} s)"
        finally:
            _end_group(process)
    found = json.loads(result.read_text()) if result.is_file() else {}
    if status == "ok" and "left_out" in found:
        status = f"left out: {found['left_out']}"
    return Outcome(status, time.monotonic() - started, seconds, found)


def _end_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def carry_home(options: argparse.Namespace, work: Path, outcomes: dict[str, Outcome]) -> str:
    """Writes the three files that are taken home; returns the table."""
    output = options.output
    text = TOY_TITLE if options.dry_run else ""
    text += table({letter: STAGES[letter].name for letter in STAGES}, outcomes, ROWS)
    (output / "table.txt").write_text(text, encoding="utf-8")
    results = {STAGES[letter].name: vars(outcome) for letter, outcome in outcomes.items()}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with tarfile.open(output / "logs.tar.gz", "w:gz") as archive:
        # Of its files a stage leaves those that are worth it in a folder `home`.
        patterns = ("*.log", "*.json", "*/*.log", "*/home/*")
        for path in sorted(path for pattern in patterns for path in work.glob(pattern)):
            archive.add(path, path.relative_to(work))
    return text


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__.partition("\n")[0])
    letters = ", ".join(f"{letter} {stage.name}" for letter, stage in STAGES.items())
    parser.add_argument("--stages", nargs="+", metavar="X", help=f"some alone: {letters}")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all of them together; 12")
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="folder to write")
    parser.add_argument("--text", type=Path, help="a folder of train-* and val-* text files")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on a CPU")
    options = parser.parse_args(arguments)
    names = {stage.name: letter for letter, stage in STAGES.items()}
    chosen = {names.get(word, word) for word in options.stages or STAGES}
    if unknown := sorted(chosen - set(STAGES)):
        parser.error(f"--stages {' '.join(unknown)}: there are {letters}")
    options.stages = sorted(chosen)
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes}: must be above 0")
    for split in ("train", "val") if options.text else ():
        if not any(options.text.glob(f"{split}-*")):
            parser.error(f"--text {options.text}: no files {split}-* lie there")
    return options


def main() -> int:
    """Runs the stages; 1 where one failed or ran out of time."""
    options = read_options()
    # A stage's process group ends with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="bov-gpu-"))
    end = time.monotonic() + 60 * options.minutes
    outcomes: dict[str, Outcome] = {}
    try:
        try:
            install_wheels(work / "wheels.log")
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"gpu-wheels could not be installed: {error}", flush=True)
        variables = environment(options) | {"TMPDIR": str(work)}
        for i, letter in enumerate(options.stages):
            seconds = max(1, limits(options.stages[i:], end - time.monotonic()))
            name = STAGES[letter].name
            result = work / f"{letter}-{name}.json"
            words = command(letter, options, result, seconds)
            log = result.with_suffix(".log")
            outcomes[letter] = found = run_stage(words, log, result, seconds, variables)
            print(f"{letter} {name}: {found.status}, {found.seconds:.0f} s", flush=True)
            text = carry_home(options, work, outcomes)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"\n{text}", end="")
    return int(any(found.status.startswith(("failed", "out")) for found in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
