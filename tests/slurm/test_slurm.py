"""A run on a real SLURM of two nodes, stopped in every way that clusters know."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import require
from slurm.cluster import Cluster, missing_programs, wait_until

from bov_lightning.checkpoint.directory import OPTIMIZER, complete_checkpoints, step_of
from bov_lightning.checkpoint.reading import read_whole
from bov_lightning.cli import main

pytestmark = pytest.mark.slurm

EVERY = 20
"""Steps between checkpoints."""


@pytest.fixture(scope="module")
def cluster():
    missing = missing_programs()
    usable = not missing and os.geteuid() == 0
    require(usable, "slurm", f"needs root and {', '.join(missing) or 'nothing else'}")
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    running = Cluster(directory)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(directory, ignore_errors=True)


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

    def newest(self) -> int:
        found = complete_checkpoints(self.run)
        return step_of(found[-1]) if found else 0

    def wait_for_progress(self) -> int:
        """The newest checkpoint, once it is a new one."""
        before = self.newest()
        return wait_until(lambda: self.newest() > before and self.newest(), "a new checkpoint")

    def wait_for_attempt(self, n: int) -> None:
        """Until the log holds ``n`` resumptions."""
        wait_until(lambda: len(self.resumed()) >= n, f"resumption {n}: {self.log[-2000:]}")

    def tell_and_wait(self) -> None:
        """Sends both tasks what SLURM sends before a time limit; until the job has requeued itself.

        Right after a requeue the new tasks are met while they import.
        """
        wait_until(lambda: len(self.tasks()) == 2, "two tasks")
        said = "bov: time limit: requeueing"
        n_before = self.log.count(said)
        self.cluster.run("scancel", "--signal=USR1", self.id)
        wait_until(lambda: self.log.count(said) == n_before + 1, f"a requeue: {self.log[-2000:]}")
        wait_until(lambda: not self.tasks() or self.cluster.state(self.id) == "RUNNING", "the end")

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


@pytest.fixture
def long_recipe(tiny_settings, workplace) -> Path:
    """A run that no test waits for the end of."""
    settings = {
        **tiny_settings,
        "checkpoint": {"every_steps": EVERY, "keep_last": 3, "keep_every": EVERY},
        "validation": {"every_steps": 30, "tokens": 640},
        "batch": {"tokens": 256, "micro": 2},
    }
    settings["model"] = {**settings["model"], "budget": {"steps": 100_000}}
    path = workplace / "long.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def assert_as_undisturbed(run: Path, recipe: Path, step: int) -> None:
    """The checkpoint at ``step`` is bit for bit that of two processes that nobody disturbed."""
    command = [sys.executable, "-m", "bov_lightning.cli", "fit", "--config", str(recipe)]
    command += ["--trainer.devices", "2", "--run.name", "undisturbed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    reference = Path("runs/undisturbed")
    name = f"checkpoints/step-{step:08d}"
    try:
        wait_until(lambda: (reference / name).exists() or process.poll() is not None, "reference")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
    for part in ("weights", OPTIMIZER):
        expected, found = (read_whole(path / name / part) for path in (reference, run))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), key


def test_a_run_survives_whatever_a_cluster_does(cluster, long_recipe, monkeypatch, capsys):
    job = Job(cluster, long_recipe, monkeypatch, capsys)
    run_slurm = cluster.run

    # What comes before a time limit: save, and the script requeues.
    job.wait_for_progress()
    job.tell_and_wait()
    job.wait_for_attempt(1)
    assert job.resumed() == job.stopped()

    # Somebody else's requeue: SLURM sends TERM.
    job.wait_for_progress()
    run_slurm("scontrol", "requeue", job.id)
    job.wait_for_attempt(2)
    assert job.resumed() == job.stopped()

    # A job of a partition with more rights takes both nodes for a moment.
    job.wait_for_progress()
    urgent = run_slurm(
        "sbatch", "--parsable", "-p", "urgent", "-N", "2", "--exclusive", "-o", "/dev/null",
        "--wrap", "sleep 1",
    ).strip()  # fmt: skip
    job.wait_for_attempt(3)
    assert cluster.state(urgent) == "COMPLETED"
    assert job.resumed() == job.stopped()

    # One task dies without a word: at most the steps since the last checkpoint are repeated.
    before = job.wait_for_progress()
    os.kill(job.tasks()[0], signal.SIGKILL)
    job.wait_for_attempt(4)
    assert len(job.stopped()) == 3
    assert job.resumed()[-1] >= before
    assert job.resumed()[-1] % EVERY == 0

    # A node dies.
    before = job.wait_for_progress()
    cluster.kill_node(2)
    for pid in job.tasks():
        os.kill(pid, signal.SIGKILL)
    cluster.start_node(2)
    job.wait_for_attempt(5)
    assert job.resumed()[-1] >= before

    # Cancelled, and submitted again: the same run goes on.
    job.wait_for_progress()
    run_slurm("scancel", job.id)
    wait_until(lambda: cluster.state(job.id) == "CANCELLED" and not job.tasks(), "the end")
    stopped = job.stopped()[-1]
    assert job.newest() == stopped
    again = Job(cluster, long_recipe, monkeypatch, capsys)
    again.wait_for_attempt(1)
    assert again.resumed() == [stopped]
    assert again.run == job.run

    # Told to stop while it still imports, whether or not it listens yet: there is nothing to lose.
    again.wait_for_progress()
    again.tell_and_wait()
    again.tell_and_wait()
    again.wait_for_attempt(2)
    assert again.resumed()[-1] == again.stopped()[0] == again.stopped()[-1]

    last = again.wait_for_progress()
    run_slurm("scancel", again.id)
    wait_until(lambda: not again.tasks(), "the end")
    assert_as_undisturbed(job.run, long_recipe, last // EVERY * EVERY)


def test_twenty_signals_in_a_row(cluster, long_recipe, monkeypatch, capsys):
    """No deadlock, and no step lost: every other one comes while the processes start."""
    job = Job(cluster, long_recipe, monkeypatch, capsys, "--run.name", "twenty")
    for _ in range(10):
        job.wait_for_progress()
        job.tell_and_wait()
        job.tell_and_wait()
    last = job.wait_for_progress()
    stopped, resumed = set(job.stopped()), job.resumed()
    assert len(stopped) == 10
    assert set(resumed) == stopped
    cluster.run("scancel", job.id)
    wait_until(lambda: not job.tasks(), "the end")
    assert_as_undisturbed(job.run, long_recipe, last // EVERY * EVERY)


def test_a_time_limit_stops_and_requeues(cluster, long_recipe, monkeypatch, capsys):
    """SLURM itself sends the signal: up to a minute early, hence in the first moments here."""
    options = ("--time", "0:02:00", "--save-before-s", "60", "--run.name", "limited")
    job = Job(cluster, long_recipe, monkeypatch, capsys, *options)
    wait_until(lambda: "bov: time limit: requeueing" in job.log, "the time limit")
    job.wait_for_attempt(1)
    assert job.resumed()[0] == job.stopped()[0]
    cluster.run("scancel", job.id)
    wait_until(lambda: not job.tasks(), "the end")


def test_all_at_once(cluster, tiny_settings, workplace, shared, monkeypatch, capsys):
    """FSDP2 ranks on two nodes, a stream, benchmarks at checkpoints, a watcher in a job of its own.

    Told to stop once and killed hard once, it ends with the weights of a run that nobody disturbed
    or evaluated, and every evaluation is there once.
    """
    source = tiny_settings["data"]["init_args"]["source"]
    settings = {
        **tiny_settings,
        "run": {"name": "all"},
        "model": {**tiny_settings["model"], "budget": {"steps": 80}},
        "checkpoint": {"every_steps": EVERY, "keep_last": 1, "keep_every": EVERY},
        "validation": {"every_steps": 30, "tokens": 640},
        "evaluation": {
            "tasks": ["core_copa"], "max_per_task": 5, "at_checkpoints": True,
            "data_dir": str(shared / "eval_bundle"),
        },
        "data": {
            "class_path": "data_modules.StreamingDataModule",
            "init_args": {
                "directory": "stream", "source": source, "tokenizer": {"vocab_size": 300},
                "packing": {"buffer": 16}, "n_lane": 4, "n_worker": 1,
            },
        },
    }  # fmt: skip
    recipe = workplace / "all.yaml"
    recipe.write_text(yaml.safe_dump(settings, sort_keys=False))
    job = Job(cluster, recipe, monkeypatch, capsys)
    beside = ("--evaluate", "--evaluation.tasks", "[core_winograd]")
    watcher = Job(cluster, recipe, monkeypatch, capsys, *beside)
    job.wait_for_progress()
    job.tell_and_wait()
    job.wait_for_progress()
    os.kill(job.tasks()[0], signal.SIGKILL)
    for each in (job, watcher):
        done = lambda each=each: cluster.state(each.id) == "COMPLETED"  # noqa: E731
        wait_until(done, f"the end: {each.log[-3000:]}", 400)

    command = [sys.executable, "-m", "bov_lightning.cli", "fit", "--config", str(recipe)]
    command += ["--trainer.devices", "2", "--run.name", "undisturbed", "--evaluation.tasks", "[]"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for part in ("weights", OPTIMIZER):
        whole, found = (
            read_whole(complete_checkpoints(run)[-1] / part)
            for run in (Path("runs/undisturbed"), job.run)
        )
        assert whole.keys() == found.keys()
        for key, tensor in whole.items():
            # Random states count what evaluations drew, and put back; they are equal too.
            assert torch.equal(tensor, found[key]), key
    for task in ("core_copa", "core_winograd"):
        for step in range(EVERY, 81, EVERY):
            results = [
                path
                for path in (job.run / "eval" / f"step-{step:08d}").glob("results*.json")
                if task in json.loads(path.read_text())["results"]
            ]
            assert len(results) == 1, (task, step, results)


def test_a_sweep_is_a_job_per_run_and_one_for_the_report(cluster, tiny_recipe, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    command = ["sweep", "--config", str(tiny_recipe), "--values", "standard,bov", "--slurm"]
    command += ["--setup", "export MASTER_ADDR=127.0.0.1"]
    assert main(command) == 0
    assert capsys.readouterr().out.count("Submitted batch job") == 3

    # At once again: nothing is submitted twice.
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.count("is queued already") == 3
    assert "Submitted" not in said

    report = Path("runs/tiny-report.html")
    wait_until(report.is_file, "the report")
    for value in ("standard", "bov"):
        run = Path("runs") / f"tiny-{value}-seed0"
        assert step_of(complete_checkpoints(run)[-1]) == 8
        assert run.name in report.read_text()
    wait_until(lambda: "tiny" not in cluster.run("squeue", "--noheader", "--format=%j"), "the end")


def test_python_without_srun_is_refused_at_once(cluster, long_recipe, workplace, monkeypatch):
    """In the batch script itself, where the processes would wait for each other for ever."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    line = f"{sys.executable} -m bov_lightning.cli fit --config {long_recipe}"
    job = cluster.run(
        "sbatch", "--parsable", "-N", "2", "--ntasks-per-node", "1", "-o", "out", "--wrap", line
    ).strip()
    wait_until(lambda: cluster.state(job) == "FAILED", "the refusal")
    assert "put srun in front" in (workplace / "out").read_text()
