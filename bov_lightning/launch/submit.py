"""`bov submit`: a run as one SLURM job that requeues itself until it is done."""

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml

from bov_lightning.errors import UserError
from bov_lightning.files import write_file
from bov_lightning.kinds import COUNT, Range
from bov_lightning.planning.own_source import try_own_source
from bov_lightning.recipe.budget import accumulation
from bov_lightning.recipe.given import Given
from bov_lightning.recipe.overlays import merge
from bov_lightning.recipe.sections import Recipe


@dataclass(frozen=True)
class JobConfig:
    """What SLURM is asked for."""

    nodes: Annotated[int, COUNT] = 1
    """Nodes of the job."""
    gpus_per_node: Annotated[int, Range(0, 10_000)] = 0
    """GPUs on each node, one task for each; 0: none are asked for."""
    tasks_per_node: Annotated[int | None, COUNT] = None
    """Processes on each node; one per GPU if not given, and one without GPUs."""
    cpus_per_task: Annotated[int | None, COUNT] = None
    """Cores of each process."""
    time: str | None = None
    """Time limit of one attempt, such as 12:00:00; the job requeues itself shortly before."""
    save_before_s: Annotated[int, COUNT] = 300
    """Seconds before the time limit at which the job is told to save: more than a step and a save
    take."""
    partition: str | None = None
    """Partition to run in."""
    account: str | None = None
    """Account to charge."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, such as --constraint=h100."""
    setup: tuple[str, ...] = ()
    """Shell lines to run first, such as module load cuda."""

    @property
    def n_task(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1


SCRIPT = """\
#!/bin/bash
# Written by bov submit. Submitting it again continues the run.
{directives}

run={run}
export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-1}}" OMP_WAIT_POLICY=passive
{setup}
newest() {{ ls -d "$run"/{progress} 2>/dev/null | grep -E '/step-[0-9]+/' | sort | cksum; }}
requeue() {{ echo "bov: $1: requeueing"; scontrol requeue "$SLURM_JOB_ID" && sleep 300; }}

before=$(newest)
# A task that ends must not take the others with it while they save; one that died must, in the end.
srun --kill-on-bad-exit=0 --wait=60 {command}
code=$?

progress=no
[ "$(newest)" != "$before" ] && progress=yes
stalls="$run/.stalled-$SLURM_JOB_ID"
if [ $progress = yes ]; then rm -f "$stalls"; else echo "$code" >> "$stalls"; fi
stalled=$(cat "$stalls" 2>/dev/null | wc -l)

case $code in
    0) ;;  # done
    2) echo "bov: a mistake that a requeue would repeat: see above" ;;
    143)  # SIGTERM: whoever sent it decides, except that SLURM forgets jobs that end by themselves
          # in the grace time of a preemption
        if scontrol show job "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]"; then requeue "preempted"
        else echo "bov: told to stop, and saved"; fi ;;
    75|138)  # the time limit is near; 138: it was before the process could listen
        if [ "$stalled" -le 3 ]; then requeue "time limit"
        else echo "bov: $stalled attempts without a new checkpoint: --time is too short"; fi ;;
    *)  # a crash, a node that failed; 74: a disk that is full or fails
        if [ $progress = yes ]; then requeue "exit code $code after progress"
        else echo "bov: exit code $code without a new checkpoint: not requeued"; fi ;;
esac
exit $code
"""


def render(recipe: Recipe, job: JobConfig, run: Path, evaluate: bool = False) -> str:
    """The sbatch file.

    Args:
        recipe: the recipe.
        job: what SLURM is asked for.
        run: the run directory, absolute.
        evaluate: watch the run and evaluate its checkpoints, instead of training it.
    """
    if evaluate:
        command, progress = watch_command(recipe, job, run), "eval/step-*/results*.json"
    else:
        command = ["fit", "--config", str(run / RECIPE)]
        progress = "checkpoints/step-*/checkpoint.json"
    name = f"{recipe.run.name}-evaluation" if evaluate else recipe.run.name
    return job_script(name, run, command, progress, job)


def job_script(name: str, folder: Path, command: list[str], progress: str, job: JobConfig) -> str:
    """The sbatch file of a `bov` command that is requeued until it is done.

    Args:
        name: of the job.
        folder: where its output goes, absolute.
        command: what follows `bov`.
        progress: a pattern in the folder; an attempt that adds no file to it has stalled.
        job: what SLURM is asked for.
    """
    options = {
        "job-name": name,
        "chdir": str(Path.cwd()),
        "output": str(folder / "slurm-%j.out"),
        "open-mode": "append",
        "requeue": None,
        "nodes": job.nodes,
        "ntasks-per-node": job.n_task,
        "gpus-per-node": job.gpus_per_node or False,
        "cpus-per-task": job.cpus_per_task or False,
        "time": job.time or False,
        "signal": f"SIGUSR1@{job.save_before_s}",
        "partition": job.partition or False,
        "account": job.account or False,
    }
    directives = [
        f"#SBATCH --{name}" + ("" if value is None else f"={shlex.quote(str(value))}")
        for name, value in options.items()
        if value is not False
    ]
    directives += [f"#SBATCH {option}" for option in job.sbatch]
    return SCRIPT.format(
        directives="\n".join(directives),
        run=shlex.quote(str(folder)),
        progress=progress,
        setup="".join(f"{line}\n" for line in job.setup),
        command=shlex.join([sys.executable, "-m", "bov_lightning.cli", *command]),
    )


def watch_command(recipe: Recipe, job: JobConfig, run: Path) -> list[str]:
    """`bov evaluate RUN --watch` with what the recipe's evaluation section asks for."""
    evaluation = recipe.evaluation
    options = {
        "--max-per-task": evaluation.max_per_task,
        "--data-dir": evaluation.data_dir,
        "--include-path": evaluation.include_path,
        "--time-limit": evaluation.time_limit,
        "--device": "cuda" if job.gpus_per_node else None,
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    return ["evaluate", str(run), "--watch", *given, "--tasks", *evaluation.tasks]


RECIPE = "recipe.yaml"
"""In the run directory: what the job trains, whatever becomes of the files it was made from."""


def submit(given: Given, job: JobConfig, evaluate: bool, dry_run: bool) -> str | None:
    """Writes recipe and sbatch file into the run directory and submits them; or prints the latter.

    Returns the job's number, None without a job.

    Args:
        given: the recipe.
        job: what SLURM is asked for.
        evaluate: watch the run and evaluate its checkpoints, instead of training it.
        dry_run: only print the sbatch file.

    Raises:
        UserError: a batch that the tasks cannot share, devices that are not those of the job, no
            sbatch on this machine, or one that refuses the job.
    """
    recipe, _ = given.recipe, given.budget
    if evaluate:
        _check_watcher(given, job)
    for key, asked in () if evaluate else (("devices", job.n_task), ("num_nodes", job.nodes)):
        configured = recipe.trainer.get(key, 1)
        if isinstance(configured, int) and configured not in (1, asked):
            raise given.error(
                f"trainer.{key} is {configured}, but the job has {asked}: leave it at 1, "
                "which a SLURM job fills in"
            )
    world = 1 if evaluate else job.nodes * job.n_task
    accumulation(recipe.batch.tokens, recipe.batch.micro, recipe.model.config.sequence_len, world)
    try_own_source(recipe.model.config)
    run = given.run.resolve()
    script = render(recipe, job, run, evaluate)
    if dry_run:
        print(script, end="")
        return None
    need_sbatch()
    if recipe.resume == "never" and run.exists() and not evaluate:
        from bov_lightning.run.directory import move_aside

        print(f"moved the old run to {move_aside(run)}")
    run.mkdir(parents=True, exist_ok=True)
    file = run / ("evaluate.sbatch" if evaluate else "submit.sbatch")
    if not evaluate:
        resume = "auto" if recipe.resume == "never" else recipe.resume
        settings = merge(given.plain, {"resume": resume, "run": {"root": str(run.parent)}})
        write_file(run / RECIPE, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    number = submit_file(file, script)
    print(f"run {run}")
    return number


def need_sbatch() -> None:
    """Refuses a machine without it."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on this machine: submit from a login node, or use --dry-run")


def submit_file(file: Path, script: str) -> str:
    """Writes an sbatch file and submits it; the job's number.

    Raises:
        UserError: an sbatch that refuses the job.
    """
    write_file(file, script)
    result = subprocess.run(["sbatch", str(file)], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"sbatch refused the job: {result.stderr.strip()}")
    print(result.stdout.strip())
    return result.stdout.split()[-1]


def _check_watcher(given: Given, job: JobConfig) -> None:
    if not given.recipe.evaluation.tasks:
        raise given.error("evaluation.tasks is empty: name what to evaluate")
    if job.nodes * job.n_task > 1:
        raise UserError("--evaluate needs one process: leave --nodes and --gpus-per-node at 1")
