"""A submitted run, and what is asked of it."""

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from processes import BovOnRanks
from slurm.cluster import Cluster, wait_until

from bov_lightning.checkpoint.directory import OPTIMIZER, complete_checkpoints, step_of
from bov_lightning.checkpoint.reading import read_whole
from bov_lightning.cli import main

EVERY = 10
"""Steps between checkpoints."""


class Job:
    """A submitted run, and what its log says."""

    def __init__(self, cluster: Cluster, recipe: Path, monkeypatch, capsys, *options: str):
        for name in ("SLURM_CONF",):
            monkeypatch.setenv(name, cluster.environment[name])
        self.cluster = cluster
        command = ["submit", "--config", str(recipe)]
        if "--evaluate" not in options:
            command += ["--nodes", "2", "--tasks-per-node", "1"]
        # All nodes of this cluster are this machine, whose host name may mean nothing.
        command += ["--setup", "export MASTER_ADDR=127.0.0.1", *options]
        assert main(command) == 0
        out = capsys.readouterr().out
        self.id = re.search(r"Submitted batch job (\d+)", out)[1]
        self.run = Path(re.search(r"^run (.+)$", out, re.MULTILINE)[1])

    @property
    def log(self) -> str:
        path = self.run / f"slurm-{self.id}.out"
        return path.read_text() if path.exists() else ""

    def wait_until(self, condition: Callable[[], object], what: str) -> object:
        """`wait_until`, which says what the job and the cluster have logged."""
        details = lambda: f"{self.log[-4000:]}\n{self.cluster.logs()}"  # noqa: E731
        return wait_until(condition, what, details=details)

    def newest(self) -> int:
        found = complete_checkpoints(self.run)
        return step_of(found[-1]) if found else 0

    def wait_for_progress(self) -> int:
        """The newest checkpoint, once it is a new one."""
        before = self.newest()
        return self.wait_until(lambda: self.newest() > before and self.newest(), "a new checkpoint")

    def wait_for_end(self) -> None:
        """Cancels it, and waits until both tasks have ended."""
        self.cluster.run("scancel", self.id)
        self.wait_until(
            lambda: self.cluster.state(self.id) == "CANCELLED" and not self.tasks(), "the end"
        )

    def wait_for_attempt(self, n: int) -> None:
        """Until the log holds ``n`` resumptions."""
        self.wait_until(lambda: len(self.resumed()) >= n, f"resumption {n}")

    def tell_and_wait(self) -> None:
        """Sends all tasks what SLURM sends before a time limit; until the job requeues itself."""
        n_before = self.n_requeue()
        self.cluster.run("scancel", "--signal=USR1", self.id)
        self.wait_until(lambda: self.n_requeue() > n_before, "a requeue")
        self.wait_until(
            lambda: not self.tasks() or self.cluster.state(self.id) == "RUNNING", "the end"
        )

    def seconds(self) -> int:
        """How long this attempt has been running."""
        passed = self.cluster.run("squeue", "--noheader", "--format=%M", "--job", self.id)
        return sum(int(n) * 60**i for i, n in enumerate(reversed(passed.strip().split(":"))))

    def limit_to(self, minutes: int) -> None:
        """Sets its time limit; SLURM refuses while an attempt is being cleaned up."""
        command = ["scontrol", "update", f"JobId={self.id}", f"TimeLimit={minutes}"]
        run = lambda: subprocess.run(command, env=self.cluster.environment).returncode  # noqa: E731
        self.wait_until(lambda: run() == 0, "a new time limit")

    def n_requeue(self) -> int:
        """How often it has requeued itself before a time limit."""
        return self.log.count("bov: time limit: requeueing")

    def resumed(self) -> list[int]:
        return [int(step) for step in re.findall(r"^resuming .* from step (\d+) ", self.log, re.M)]

    def stopped(self) -> list[int]:
        return [int(step) for step in re.findall(r"^stopped at step (\d+) ", self.log, re.M)]

    def tasks(self) -> list[int]:
        """Process ids of the training processes of this run."""
        found = subprocess.run(
            ["pgrep", "-f", f"^[^ ]*python[^ ]* .*fit --config {self.run}/recipe.yaml"],
            capture_output=True, text=True,
        )  # fmt: skip
        return [int(pid) for pid in found.stdout.split()]

    def wait_for_tasks(self, condition: Callable[[int], bool]) -> list[int]:
        """Process ids of both tasks, once both fulfil a condition."""

        def both() -> list[int]:
            tasks = self.tasks()
            return tasks if len(tasks) == 2 and all(map(condition, tasks)) else []

        return self.wait_until(both, "two tasks")


def has_signal(pid: int, field: str) -> bool:
    """Whether SIGUSR1 is in a set of signals: SigCgt, that it listens to; ShdPnd, that wait."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    found = next(line for line in lines if line.startswith(f"{field}:"))
    return bool(int(found.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def listens(pid: int) -> bool:
    """Whether it would survive SIGUSR1."""
    return has_signal(pid, "SigCgt")


def assert_as_undisturbed(run: Path, recipe: Path, step: int) -> None:
    """The checkpoint at ``step`` is bit for bit that of two processes that nobody disturbed."""
    reference = Path("runs/undisturbed")
    name = f"checkpoints/step-{step:08d}"
    command = ("fit", "--config", str(recipe), "--run.name", "undisturbed")
    with BovOnRanks(2, *command) as process:
        there = lambda: (reference / name).exists() or process.poll() is not None  # noqa: E731
        wait_until(there, "reference")
        process.ranks[0].send_signal(signal.SIGTERM)
        assert process.wait(60) == [143, 143], process.printed
    for part in ("weights", OPTIMIZER):
        expected, found = (read_whole(path / name / part) for path in (reference, run))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), key


def assert_ends_as_undisturbed(job: Job, recipe: Path) -> None:
    """After one more checkpoint."""
    last = job.wait_for_progress()
    job.wait_for_end()
    assert_as_undisturbed(job.run, recipe, last // EVERY * EVERY)
