"""`bov sweep --ladder`: plans, trains what is missing, and reports."""

import datetime
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bov_lightning.console import say
from bov_lightning.distributed.preemption import Preempted
from bov_lightning.errors import UserError
from bov_lightning.launch.ladder import LadderRuns
from bov_lightning.launch.ladder_plan import costs, print_plan, too_many_epochs
from bov_lightning.launch.sweep_here import STOP_SIGNALS, prepare_data, signals
from bov_lightning.report.ladder_report import write_ladder_report
from bov_lightning.report.ladder_results import read_results, read_speeds, write_speeds

POLL_S = 0.2


@dataclass(frozen=True)
class LadderOptions:
    """What is done with a ladder, and how."""

    output: Path
    """Where runs.csv, speed.csv and the report are."""
    n_job: int = 1
    """Runs that go on at the same time."""
    deadline: float = math.inf
    """Seconds since the epoch at which runs are told to save."""
    flops_per_second: float | None = None
    """For the plan's estimate; None: measured."""
    dry_run: bool = False
    """Print the plan and stop."""
    speed: bool = False
    """Measure speeds, and nothing else."""
    report: bool = False
    """Make the report of what runs.csv holds, and nothing else."""
    worker: bool = False
    """This is one of several processes that train: no plan, no report."""
    slurm_job: Any | None = None
    """`submit.JobConfig` of each of n_job jobs, instead of running here."""


def deadline_of(stop_at: str | None, time_limit: float | None) -> float:
    """Seconds since the epoch at which to stop.

    Args:
        stop_at: HH:MM, the next time that the clock shows it.
        time_limit: seconds from now.
    """
    now, ends = time.time(), [math.inf]
    if time_limit is not None:
        ends.append(now + time_limit)
    if stop_at is not None:
        try:
            at = datetime.datetime.strptime(stop_at, "%H:%M").time()
        except ValueError:
            raise UserError(f"--stop-at {stop_at}: give a time of day, such as 17:30") from None
        here = datetime.datetime.now()
        end = datetime.datetime.combine(here.date(), at)
        end += datetime.timedelta(days=1) if end <= here else datetime.timedelta()
        ends.append(end.timestamp())
    return min(ends)


def sweep_ladder(runs: LadderRuns, options: LadderOptions, arguments: list[str]) -> None:
    """Trains what is missing of a ladder, and writes its report.

    Args:
        runs: the ladder's.
        options: how.
        arguments: of this `bov sweep`, for the processes that it starts.

    Raises:
        UserError: results of other settings, of other text; runs that failed; no number for the
            baseline.
        Preempted: a signal; every run that was training has saved.
    """
    folder = options.output
    if options.worker:
        from bov_lightning.launch.ladder_worker import work

        if failed := work(runs, folder, options.deadline):
            raise UserError(f"{len(failed)} runs failed: {', '.join(failed)}")
        return
    if options.report:
        print(write_ladder_report(runs.ladder, folder))
        return
    if options.speed:
        from bov_lightning.launch.ladder_speed import measure_all

        write_speeds(folder, measure_all(runs))
        return
    results = read_results(folder)
    runs.check(results, folder)
    _check_text(runs, results, folder)
    width = None if sys.stdout.isatty() else 160
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    known = costs(runs, list(results.values()), read_speeds(folder), options.flops_per_second)
    print_plan(runs, results, known, options.n_job, console)
    if options.dry_run:
        return
    left = [job for job in runs.wanted_jobs() if job.name not in results]
    if left:
        if runs.corpus_tokens is None:
            prepare_data(runs.text_arguments())
            for line in too_many_epochs(runs):
                say(line)
            _check_text(runs, results, folder)
        if options.slurm_job is not None:
            _submit(runs, options, arguments)
            return
        failed = _train(runs, options, arguments)
        results = read_results(folder)
        n_left = sum(job.name not in results for job in runs.wanted_jobs())
        if failed:
            if results:
                print(write_ladder_report(runs.ladder, folder))
            raise UserError(f"{failed}: see {runs.root}/*/sweep.log; the same command goes on")
        if n_left:
            say(f"the time is up, {n_left} runs are left: the same command goes on")
    if results:
        print(write_ladder_report(runs.ladder, folder))


def _check_text(runs: LadderRuns, results: dict, folder: Path) -> None:
    """Refuses to add runs of another text or tokenizer to a folder of results."""
    found = runs.corpus()
    if found is None or not results:
        return
    one = next(iter(results.values()))
    for name, value in found[1].items():
        if getattr(one, name) != value:
            raise UserError(
                f"{folder} holds runs of {name} {getattr(one, name)}, and the data given here has "
                f"{value}: they cannot be compared; give another --output"
            )


def _train(runs: LadderRuns, options: LadderOptions, arguments: list[str]) -> str:
    """Trains here, in this process or in several beside each other; what failed, in words."""
    if options.n_job == 1:
        from bov_lightning.launch.ladder_worker import work

        failed = work(runs, options.output, options.deadline)
        return f"{len(failed)} runs failed: {', '.join(failed)}" if failed else ""
    command = [sys.executable, "-m", "bov_lightning.cli", "sweep", *arguments, "--jobs", "1",
               "--as-worker"]  # fmt: skip
    if math.isfinite(options.deadline):
        command += ["--time-limit", str(max(1.0, options.deadline - time.time()))]
    with signals() as received:
        processes = [
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, **environment},
            )
            for environment in _environments(runs, options.n_job)
        ]  # fmt: skip
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_S)
            if received:
                number, code = STOP_SIGNALS[received[0]]
                for process in processes:
                    process.send_signal(number)
                for process in processes:
                    process.wait()
                say("stopped: the same command continues the ladder")
                raise Preempted(code)
    codes = [process.returncode for process in processes if process.returncode]
    return f"{len(codes)} of {len(processes)} workers had runs that failed" if codes else ""


def _environments(runs: LadderRuns, n_job: int) -> list[dict[str, str]]:
    """What each worker finds in its environment: one thread, and one of the GPUs in turn."""
    own = {"OMP_NUM_THREADS": "1"}
    if runs.device == "cpu":
        return [own] * n_job
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = [x for x in visible.split(",") if x] or list(map(str, range(torch.cuda.device_count())))
    return [own | {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(n_job)]


def _submit(runs: LadderRuns, options: LadderOptions, arguments: list[str]) -> None:
    """Submits n_job jobs, each of which trains what the others have not taken, and reports."""
    from bov_lightning.launch.submit import job_script, need_sbatch, submit_file

    need_sbatch()
    name, folder = runs.ladder.name, runs.root.resolve()
    command = ["sweep", *(x for x in arguments if x != "--slurm"), "--jobs", "1"]
    progress = f"{name}-*/checkpoints/step-*/checkpoint.json"
    for i in range(options.n_job):
        script = job_script(f"{name}-{i}", folder, command, progress, options.slurm_job)
        submit_file(folder / f"{name}-{i}.sbatch", script)
