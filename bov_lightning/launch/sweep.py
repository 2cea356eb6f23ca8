"""`bov sweep`: the same recipe with several value sources and seeds, at equal FLOPs.

Every run is an ordinary `bov fit` in a process (or a SLURM job) of its own: what is finished stays
finished, what is broken resumes, and any run can be repeated by hand.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bov_lightning.errors import UserError
from bov_lightning.files import write_file
from bov_lightning.launch.sweep_here import prepare_data, run_here
from bov_lightning.launch.sweep_rows import Row
from bov_lightning.report import write_report
from bov_lightning.text import lines


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
    print_rows(rows, Console(highlight=False, markup=False, emoji=False, width=width))
    if dry_run:
        return
    first, runs = rows[0], [row.run for row in rows]
    name = first.given.recipe.run.name.removesuffix(f"-{first.value}-seed{first.seed}")
    output = output or Path(first.given.recipe.run.root) / f"{name}-report.html"
    if slurm_job is None or all(row.is_finished() for row in rows):
        run_here(rows, n_job)
        print(write_report(runs, output))
        return
    report = [sys.executable, "-m", "bov_lightning.cli", "report", *map(str, runs)]
    report += ["--output", str(output)]
    script = Path(first.given.recipe.run.root).resolve() / f"{name}-report.sbatch"
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
        state = f"at step {step}" if step else "new"
        if row.is_finished():
            state = "finished" if step == row.n_step else f"ended at step {step}"
        table.add_row(
            row.run.name, f"{row.n_step:,}", f"{row.plan['flops']:.4g}",
            f"{params['live']:,}", f"{params['tables']:,}", state,
        )  # fmt: skip
    console.print(table, soft_wrap=True)


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
    listed = (line.partition(" ") for line in lines(result.stdout))
    queued = {name: number for number, _, name in listed}
    waiting = [row for row in rows if not row.is_finished() and row.run.name not in queued]
    if waiting:
        prepare_data(waiting[0].arguments)
    jobs, n_new = [], 0
    for row in rows:
        if row.is_finished():
            continue
        if row.run.name in queued:
            print(f"{row.run.name} is queued already, as job {queued[row.run.name]}")
            jobs.append(queued[row.run.name])
        else:
            jobs.append(submit(row.given, job, False, False))
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
