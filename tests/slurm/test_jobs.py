"""A job on a real SLURM of two nodes, with evaluations inside and beside it."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from processes import bov_on_ranks
from slurm.cluster import wait_until
from slurm.job import Job

from bov_lightning.checkpoint.directory import OPTIMIZER, complete_checkpoints
from bov_lightning.checkpoint.reading import read_whole

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
