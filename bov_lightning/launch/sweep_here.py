"""Trains the runs of a sweep on this machine."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from bov_lightning.console import CONSOLE, say
from bov_lightning.distributed.preemption import REQUEUE, STOPPED, Preempted
from bov_lightning.errors import UserError
from bov_lightning.launch.sweep_rows import Row
from bov_lightning.recipe.sections import Recipe
from bov_lightning.text import lines

POLL_S = 0.5
LINES_EVERY_S = 60.0
STOP_SIGNALS = {
    signal.SIGINT: (signal.SIGTERM, 130),
    signal.SIGTERM: (signal.SIGTERM, STOPPED),
    signal.SIGHUP: (signal.SIGTERM, STOPPED),
    signal.SIGUSR1: (signal.SIGUSR1, REQUEUE),
}
"""By signal: what the runs are sent, so that they save; and the sweep's exit code."""


def run_here(rows: list[Row], n_job: int) -> None:
    """Trains what is not finished, ``n_job`` runs at a time.

    Args:
        rows: the runs.
        n_job: how many run at a time; GPUs and, on a CPU, cores are shared out among them.

    Raises:
        UserError: runs that failed; the others have been trained.
        Preempted: a signal; every run that was training has saved.
    """
    slots = _slots(rows[0].given.recipe, n_job)
    waiting = [row for row in rows if not row.is_finished()]
    if waiting:
        prepare_data(waiting[0].arguments)
    training: dict[int, tuple[Row, subprocess.Popen]] = {}
    failed: list[Row] = []
    told = False
    with _Screen(rows) as screen, signals() as received:
        while waiting or training:
            for slot in sorted(set(range(n_job)) - set(training)):
                if not received and (started := _start_next(waiting, slots[slot])):
                    training[slot] = started
            if waiting and not training and not told:
                told = True
                screen.say(f"another process trains {waiting[0].run}: waiting for it")
            time.sleep(POLL_S)
            for slot, (row, process) in list(training.items()):
                if process.poll() is None:
                    continue
                del training[slot]
                if process.returncode == 0:
                    screen.say(f"{row.run.name}: {row.progress()}")
                elif not received:
                    failed.append(row)
                    log = row.directory.log.read_bytes().decode("utf-8", "replace")
                    said = list(lines(log))[-1:]
                    screen.say(f"{row.run.name} failed: {(said or [process.returncode])[0]}")
            screen.show([row for row, _ in training.values()], waiting)
            if received:
                number, code = STOP_SIGNALS[received[0]]
                for row, process in training.values():
                    screen.say(f"{row.run.name}: saving")
                    process.send_signal(number)
                for _, process in training.values():
                    process.wait()
                screen.say("stopped: the same command continues the sweep")
                raise Preempted(code)
    if failed:
        names = ", ".join(str(row.directory.log) for row in failed)
        raise UserError(
            f"{len(failed)} of {len(rows)} runs failed: see {names}; the same command goes on"
        )


def prepare_data(arguments: list[str]) -> None:
    """Makes the data before the first run: runs that start together must not make it twice.

    Args:
        arguments: of `bov prepare`.
    """
    command = [sys.executable, "-m", "bov_lightning.cli", "prepare", *arguments]
    code = subprocess.run(command).returncode
    if code:
        raise UserError(f"the data could not be prepared (exit code {code}): see above")


def _start_next(waiting: list[Row], environment: dict[str, str]):
    """Starts the first waiting run that no other process trains; takes it off the list."""
    for row in list(waiting):
        if row.directory.trainer() is not None or (lock := lock_run(row.run)) is None:
            continue
        waiting.remove(row)
        if row.is_finished():
            # Another sweep, or the run of one that was killed, has done it in the meantime.
            os.close(lock)
            continue
        row.run.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "bov_lightning.cli", "fit", *row.arguments]
        with open(row.directory.log, "ab") as log:
            # A session of its own: Ctrl-C in the terminal reaches the sweep alone, which passes
            # it on as a signal that saves. The lock lives as long as the process does.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock],
                start_new_session=True, env={**os.environ, **environment},
            )  # fmt: skip
        os.close(lock)
        return row, process
    return None


def lock_run(run: Path) -> int | None:
    """A file descriptor that holds the run; None while another sweep's process holds it."""
    run.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(run.parent / f".{run.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _slots(recipe: Recipe, n_job: int) -> list[dict[str, str]]:
    """What each of the runs that go on at the same time finds in its environment."""
    if n_job == 1:
        return [{}]
    import torch

    devices = recipe.trainer.get("devices", 1)
    if torch.cuda.is_available() and recipe.trainer.get("accelerator") != "cpu":
        if not isinstance(devices, int) or devices < 1:
            raise UserError(f"trainer.devices is {devices!r}: with --jobs, give a number")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = [x for x in visible.split(",") if x] or [
            str(i) for i in range(torch.cuda.device_count())
        ]
        if len(gpus) < n_job * devices:
            raise UserError(
                f"--jobs {n_job} with {devices} devices each needs {n_job * devices} GPUs, but "
                f"there are {len(gpus)}"
            )
        return [
            {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * devices : (i + 1) * devices])}
            for i in range(n_job)
        ]
    if "OMP_NUM_THREADS" in os.environ:
        return [{}] * n_job
    n_thread = max(1, len(os.sched_getaffinity(0)) // n_job)
    return [{"OMP_NUM_THREADS": str(n_thread)}] * n_job


@contextmanager
def signals():
    """A list that the first signal's number is put into."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in STOP_SIGNALS
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Screen:
    """Bars on a terminal, a line per event and minute elsewhere."""

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self.bars: Progress | None = None
        self.tasks: dict[Path, Any] = {}
        self.line_at = time.monotonic()

    def __enter__(self) -> "_Screen":
        if CONSOLE.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(20),
                TextColumn("{task.fields[at]}"),
            )
            self.bars = Progress(*columns, console=CONSOLE)
            self.all = self.bars.add_task("all runs", total=len(self.rows), at="")
            self.bars.start()
        return self

    def __exit__(self, *error) -> None:
        if self.bars is not None:
            self.bars.stop()

    def say(self, line: str) -> None:
        """One line that stays."""
        say(line)

    def show(self, training: list[Row], waiting: list[Row]) -> None:
        """How far the runs are that are training now."""
        if self.bars is None:
            if time.monotonic() - self.line_at >= LINES_EVERY_S:
                self.line_at = time.monotonic()
                for row in training:
                    self.say(f"{row.run.name}: {row.progress()}")
            return
        done = len(self.rows) - len(waiting) - len(training)
        self.bars.update(self.all, completed=done, at=f"{done}/{len(self.rows)}")
        for path in set(self.tasks) - {row.run for row in training}:
            self.bars.remove_task(self.tasks.pop(path))
        for row in training:
            if row.run not in self.tasks:
                self.tasks[row.run] = self.bars.add_task(row.run.name, total=row.n_step, at="")
            self.bars.update(self.tasks[row.run], completed=row.measured().step, at=row.progress())
