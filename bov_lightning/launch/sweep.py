"""`bov sweep`: the same recipe with several value sources and seeds, at equal FLOPs.

Every run is an ordinary `bov fit` in a process (or a SLURM job) of its own: what is finished stays
finished, what is broken resumes, and any run can be repeated by hand.
"""

import fcntl
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from bov_lightning.checkpoint.directory import complete_checkpoints, step_of
from bov_lightning.distributed.preemption import REQUEUE, STOPPED, Preempted
from bov_lightning.errors import UserError
from bov_lightning.files import write_file
from bov_lightning.recipe.budget import accumulation
from bov_lightning.recipe.sections import (
    FIXED_BY_RUN,
    Recipe,
    first_difference,
    part_of,
    plain,
    read_yaml,
)
from bov_lightning.report import write_report
from bov_lightning.report.reading import read_metrics

POLL_S = 0.5
LINES_EVERY_S = 60.0
LOG = "sweep.log"
"""In each run directory: what its `bov fit` said."""

STOP_SIGNALS = {
    signal.SIGINT: (signal.SIGTERM, 130),
    signal.SIGTERM: (signal.SIGTERM, STOPPED),
    signal.SIGHUP: (signal.SIGTERM, STOPPED),
    signal.SIGUSR1: (signal.SIGUSR1, REQUEUE),
}
"""By signal: what the runs are sent, so that they save; and the sweep's exit code."""


class Measured(NamedTuple):
    """How far a run is."""

    step: int
    """The last step that was logged; 0: none."""
    validated_step: int
    """The last step that was validated; 0: none."""
    val_bpb: float
    """Bits per byte there."""


@dataclass(frozen=True)
class Row:
    """One run of the table."""

    value: str
    """Name of the value overlay."""
    seed: int
    """Seed of initialisation and data order."""
    recipe: Recipe
    settings: dict[str, Any]
    """The recipe as plain data."""
    arguments: list[str]
    """Of `bov fit`."""
    plan: dict[str, Any]
    """See `budget.make_plan`."""

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.recipe.run.root) / self.recipe.run.name

    @property
    def n_step(self) -> int:
        """Optimizer steps of the whole run."""
        return self.plan["iterations"]

    def step(self) -> int:
        """Steps that the newest complete checkpoint holds."""
        return max((step_of(path) for path in complete_checkpoints(self.run)), default=0)

    def measured(self) -> "Measured":
        """What metrics.csv says."""
        try:
            metrics, _ = read_metrics(self.run / "metrics.csv", self.recipe.batch.tokens)
        except UserError:
            return Measured(0, 0, math.nan)
        validated = np.flatnonzero(np.isfinite(metrics["val_bpb"]))
        step = int(metrics["step"][-1])
        if not len(validated):
            return Measured(step, 0, math.nan)
        last = validated[-1]
        return Measured(step, int(metrics["step"][last]), float(metrics["val_bpb"][last]))

    def progress(self) -> str:
        """How far the run is, for people."""
        measured = self.measured()
        bpb = f"  val_bpb {measured.val_bpb:.4f}" if measured.validated_step else ""
        # Checkpoints may come more often than rows of metrics.
        return f"step {max(measured.step, self.step())}/{self.n_step}{bpb}"

    def is_finished(self) -> bool:
        """Whether the last checkpoint is there, validated, and evaluated if the recipe asks so."""
        if self.step() != self.n_step:
            return False
        if self.measured().validated_step != self.n_step:
            return False
        evaluation = self.recipe.evaluation
        if not (evaluation.tasks and evaluation.at_end):
            return True
        return any((self.run / "eval" / f"step-{self.n_step:08d}").glob("results*.json"))

    def check(self) -> None:
        """Refuses what `bov fit` would, before anything trains: a batch that does not divide, a
        directory of this name that holds another run."""
        batch = self.recipe.batch
        accumulation(batch.tokens, batch.micro, self.recipe.model.config.sequence_len, 1)
        if not (self.run / "config.yaml").is_file():
            return
        stored = read_yaml(self.run / "config.yaml")
        given = {name: plain(value) for name, value in vars(self.recipe).items()}
        given["data"] = self.settings["data"]
        for section in FIXED_BY_RUN:
            # Only what the recipe says: the stored one also has the data's defaults.
            difference = first_difference(
                part_of(given, section), part_of(stored, section), section
            )
            if difference:
                key, now, before = difference
                raise UserError(
                    f"{self.run} was trained with {key} {before!r}, not {now!r}: give the sweep "
                    "another --run.name"
                )
        if self.step() > self.n_step:
            raise UserError(
                f"{self.run} has trained {self.step()} steps, but the budget pays for "
                f"{self.n_step}: give the sweep another --run.name"
            )


def sweep(
    rows: list[Row], output: Path | None, n_job: int, slurm_job: Any | None, dry_run: bool
) -> None:
    """Trains the rows, or what is missing of them, and writes the report.

    Args:
        rows: the runs; the first is the baseline of the report.
        output: the report's file; None: beside the runs.
        n_job: how many run at a time, here.
        slurm_job: `submit.JobConfig` to submit each run with, instead of running it here.
        dry_run: print the plan and stop.

    Raises:
        UserError: a run of one of these names that was trained with other settings, or failed.
        Preempted: a signal; every run that was training has saved.
    """
    for row in rows:
        row.check()
    # What is no terminal has no width: lines must not be cut.
    width = None if sys.stdout.isatty() else 120
    print_rows(rows, Console(highlight=False, width=width))
    if dry_run:
        return
    first, runs = rows[0], [row.run for row in rows]
    name = first.recipe.run.name.removesuffix(f"-{first.value}-seed{first.seed}")
    output = output or Path(first.recipe.run.root) / f"{name}-report.html"
    if slurm_job is None or all(row.is_finished() for row in rows):
        run_here(rows, n_job)
        print(write_report(runs, output))
        return
    report = [sys.executable, "-m", "bov_lightning.cli", "report", *map(str, runs)]
    report += ["--output", str(output)]
    script = Path(first.recipe.run.root).resolve() / f"{name}-report.sbatch"
    run_on_slurm(rows, slurm_job, report, script)


def print_rows(rows: list[Row], console: Console) -> None:
    """What is going to be trained, and how far it is."""
    table = Table(box=None, header_style="bold")
    for name in ("run", "steps", "FLOPs", "parameters", "in tables", "state"):
        justify = "left" if name in ("run", "state") else "right"
        table.add_column(name, justify=justify, no_wrap=True, overflow="ignore")
    for row in rows:
        params = row.plan["params"]
        step = row.step()
        state = "finished" if row.is_finished() else f"at step {step}" if step else "new"
        table.add_row(
            row.run.name, f"{row.n_step:,}", f"{row.plan['flops']:.4g}",
            f"{params['live']:,}", f"{params['tables']:,}", state,
        )  # fmt: skip
    console.print(table, soft_wrap=True)


def run_here(rows: list[Row], n_job: int) -> None:
    """Trains what is not finished, ``n_job`` runs at a time.

    Args:
        rows: the runs.
        n_job: how many run at a time; GPUs and, on a CPU, cores are shared out among them.

    Raises:
        UserError: runs that failed; the others have been trained.
        Preempted: a signal; every run that was training has saved.
    """
    slots = _slots(rows[0].recipe, n_job)
    waiting = [row for row in rows if not row.is_finished()]
    if waiting:
        _prepare(waiting[0])
    training: dict[int, tuple[Row, subprocess.Popen]] = {}
    failed: list[Row] = []
    told = False
    with _Screen(rows) as screen, _signals() as received:
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
                    said = (row.run / LOG).read_text(errors="replace").splitlines()[-1:]
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
        names = ", ".join(str(row.run / LOG) for row in failed)
        raise UserError(
            f"{len(failed)} of {len(rows)} runs failed: see {names}; the same command goes on"
        )


def _prepare(row: Row) -> None:
    """Makes the data before the first run: runs that start together must not make it twice."""
    command = [sys.executable, "-m", "bov_lightning.cli", "prepare", *row.arguments]
    code = subprocess.run(command).returncode
    if code:
        raise UserError(f"the data could not be prepared (exit code {code}): see above")


def _start_next(waiting: list[Row], environment: dict[str, str]):
    """Starts the first waiting run that no other process trains; takes it off the list."""
    for row in list(waiting):
        lock = _lock(row.run)
        if lock is None:
            continue
        waiting.remove(row)
        if row.is_finished():
            # Another sweep, or the run of one that was killed, has done it in the meantime.
            os.close(lock)
            continue
        row.run.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "bov_lightning.cli", "fit", *row.arguments]
        with open(row.run / LOG, "ab") as log:
            # A session of its own: Ctrl-C in the terminal reaches the sweep alone, which passes
            # it on as a signal that saves. The lock lives as long as the process does.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock],
                start_new_session=True, env={**os.environ, **environment},
            )  # fmt: skip
        os.close(lock)
        return row, process
    return None


def _lock(run: Path) -> int | None:
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
def _signals():
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
        self.console = Console(stderr=True)
        self.bars: Progress | None = None
        self.tasks: dict[Path, Any] = {}
        self.line_at = time.monotonic()

    def __enter__(self) -> "_Screen":
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(20),
                TextColumn("{task.fields[at]}"),
            )
            self.bars = Progress(*columns, console=self.console)
            self.all = self.bars.add_task("all runs", total=len(self.rows), at="")
            self.bars.start()
        return self

    def __exit__(self, *error) -> None:
        if self.bars is not None:
            self.bars.stop()

    def say(self, line: str) -> None:
        """One line that stays."""
        self.console.print(line, highlight=False, soft_wrap=True)

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


def run_on_slurm(rows: list[Row], job: Any, report: list[str], script: Path) -> None:
    """Submits a job for every run that is neither finished nor queued, and one for the report.

    Args:
        rows: the runs.
        job: `submit.JobConfig` of each run.
        report: the command that writes the report, once all runs have ended.
        script: where to write the report's sbatch file.
    """
    from bov_lightning.launch.submit import submit

    if shutil.which("squeue") is None:
        raise UserError(
            "squeue is not on this machine: sweep from a login node, or without --slurm"
        )
    command = ["squeue", "--noheader", "--format=%i %j", "--me"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"squeue failed: {result.stderr.strip()}")
    lines = (line.partition(" ") for line in result.stdout.splitlines())
    queued = {name: number for number, _, name in lines}
    jobs, n_new = [], 0
    for row in rows:
        if row.is_finished():
            continue
        if row.run.name in queued:
            print(f"{row.run.name} is queued already, as job {queued[row.run.name]}")
            jobs.append(queued[row.run.name])
        else:
            jobs.append(submit(row.recipe, row.settings, row.run.name, job, False, False))
            n_new += 1
    if script.stem in queued and not n_new:
        print(f"the report is queued already, as job {queued[script.stem]}")
        return
    options = [f"--job-name={script.stem}", "--ntasks=1"]
    options += [f"--output={script.with_suffix('.out')}", f"--chdir={Path.cwd()}"]
    options += [f"--dependency=afterany:{':'.join(jobs)}"] if jobs else []
    options += [f"--{k}={v}" for k in ("partition", "account") if (v := getattr(job, k))]
    setup = "".join(f"{line}\n" for line in job.setup)
    write_file(script, f"#!/bin/bash\n# Written by bov sweep.\n{setup}{shlex.join(report)}\n")
    result = subprocess.run(["sbatch", *options, str(script)], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"sbatch refused the report's job: {result.stderr.strip()}")
    print(f"{result.stdout.strip()} (the report, when all have ended)")
