"""`make soak`: kill -9 of a whole run at random moments, over and over.

python tests/soak.py [N_KILL]
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from forks import Bov
from runs import newest

from bov_lightning.checkpoint.directory import complete_checkpoints
from bov_lightning.checkpoint.reading import read_whole


@dataclass
class Series:
    """What happened."""

    n_kill: int = 0
    during_save: int = 0
    before_first_step: int = 0


def saves(run: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were when their process was killed."""
    found = set()
    for path in (run / "checkpoints").glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def kill_series(
    start: Callable[[], subprocess.Popen | Bov], run: Path, n_kill: int, seconds: float = 10,
    seed: int = 0,
) -> Series:  # fmt: skip
    """Starts the run, kills its whole process group at a random moment, and again; lets it end.

    Ends early where the run does. Every second kill waits until a save has begun. A run must never
    fall behind the newest checkpoint that it had, nor lose it.

    Args:
        start: starts the run's command as the leader of a process group.
        run: its directory.
        n_kill: how often.
        seconds: in which a kill comes at first, later 3 more than the last run took to its death.
        seed: of the moments.
    """
    series, chance, least = Series(), random.Random(seed), min(seconds, 3)
    while series.n_kill < n_kill:
        before, left, started = newest(run), saves(run), time.monotonic()
        process = start()
        try:
            if series.n_kill % 2:
                while not saves(run) - left:
                    if process.poll() is not None:
                        break
                    time.sleep(0.001)
            else:
                time.sleep(chance.uniform(0, seconds))
            saving = bool(saves(run) - left)
            if process.poll() is not None:
                assert process.returncode == 0, process.communicate()
                return series  # the run has come to its end
            os.killpg(process.pid, signal.SIGKILL)
        finally:
            _, error = process.communicate()
        if before and series.n_kill % 2:
            assert f"resuming {run} from step {before} " in error
        after = newest(run)
        assert after >= before, f"step {before} was complete, and now {after} is the newest"
        series.n_kill += 1
        series.during_save += saving
        series.before_first_step += "resuming" not in error and after == 0
        seconds = max(least, min(seconds, time.monotonic() - started + 3))
    last = start()
    _, error = last.communicate()
    assert last.returncode == 0, error
    return series


def main() -> None:
    """Trains the quickstart's model on a little text, killed N_KILL times, and once undisturbed."""
    n_kill = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    steps = ("--model.budget", f"{{steps: {40 * n_kill}}}", "--checkpoint.every_steps", "5")
    small = ("--model.config.n_layer", "3", "--model.config.d_model", "64", "--batch.micro", "4")
    sizes = ("--batch.tokens", "1024", "--validation.tokens", "4096", "--checkpoint.keep_last", "2")
    start = [
        sys.executable,
        "-m",
        "bov_lightning.cli",
        "fit",
        "--config",
        "recipes/quickstart.yaml",
    ]
    with tempfile.TemporaryDirectory() as folder:
        common = [*start, *steps, *small, *sizes, "--run.root", folder]
        killed = partial(
            subprocess.Popen, [*common, "--run.name", "killed"], start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        series = kill_series(killed, Path(folder) / "killed", n_kill)
        assert series.n_kill == n_kill, f"the run ended after {series.n_kill} kills"
        subprocess.run([*common, "--run.name", "whole"], check=True)
        ends = [complete_checkpoints(Path(folder) / name)[-1] for name in ("whole", "killed")]
        for part in ("weights", "optimizer"):
            whole, killed = (read_whole(end / part) for end in ends)
            differ = [name for name, tensor in whole.items() if not tensor.equal(killed[name])]
            assert not differ, f"{part} differ: {differ}"
    print(f"{series}: weights and optimizer state are those of the undisturbed run")


if __name__ == "__main__":
    main()
