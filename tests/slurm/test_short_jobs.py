"""Short jobs on a real SLURM: a sweep, and a mistake in a batch script."""

import sys
from pathlib import Path

import pytest
from slurm.cluster import wait_until

from bov_lightning.checkpoint.directory import complete_checkpoints, step_of
from bov_lightning.cli import main

pytestmark = pytest.mark.slurm


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
