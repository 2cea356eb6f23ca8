"""Jobs on a real SLURM of two nodes: evaluations beside a run, sweeps, and mistakes."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from processes import bov_on_ranks
from slurm.cluster import wait_until
from slurm.job import Job

from bov_lightning.checkpoint.directory import OPTIMIZER, complete_checkpoints, step_of
from bov_lightning.checkpoint.reading import read_whole
from bov_lightning.cli import main

pytestmark = pytest.mark.slurm


def test_all_at_once(cluster, tiny_settings, workplace, shared, monkeypatch, capsys):
    """FSDP2 ranks on two nodes, a stream, benchmarks at checkpoints, a watcher in a job of its own.

    Told to stop once and killed hard once, it ends with the weights of a run that nobody disturbed
    or evaluated, and every evaluation is there once.
    """
    source = tiny_settings["data"]["init_args"]["source"]
    settings = {
        **tiny_settings,
        "run": {"name": "all"},
        "model": {**tiny_settings["model"], "budget": {"steps": 60}},
        "checkpoint": {"every_steps": 20, "keep_last": 1, "keep_every": 20},
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

    options = ("--run.name", "undisturbed", "--evaluation.tasks", "[]")
    bov_on_ranks(2, "fit", "--config", str(recipe), *options)
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
        for step in range(20, 61, 20):
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
