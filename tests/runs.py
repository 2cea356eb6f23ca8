"""Runs of `bov fit` in tests: starting them, and comparing what they leave."""

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bov_lightning
from bov_lightning.checkpoint.directory import OPTIMIZER, complete_checkpoints, step_of
from bov_lightning.checkpoint.reading import read_training_state, read_weights, read_whole
from bov_lightning.cli import main


def fit(recipe: Path, *options: str) -> Path:
    """Trains the tiny recipe, or one of its name; the run directory."""
    assert main(["fit", "--config", str(recipe), *options]) == 0
    name = options[options.index("--run.name") + 1] if "--run.name" in options else "tiny"
    return Path("runs") / name


def die_after(run: Path, step: int) -> None:
    """As if the job had been killed just after that checkpoint: later ones are half written."""
    for path in complete_checkpoints(run):
        if step_of(path) > step:
            path.rename(path.with_name(f".{path.name}.partial"))


def final_state(run: Path) -> tuple[dict, dict]:
    """Weights and optimizer state of the newest checkpoint, whole."""
    newest = complete_checkpoints(run)[-1]
    optimizer = read_whole(newest / OPTIMIZER)
    return read_weights(newest), {k: t for k, t in optimizer.items() if not k.startswith("random.")}


def assert_same_end(first: Path, second: Path) -> None:
    """Weights and optimizer state are equal bit for bit."""
    for tensors, others in zip(final_state(first), final_state(second), strict=True):
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name
    state, other = (read_training_state(complete_checkpoints(run)[-1]) for run in (first, second))
    assert state["global_step"] == other["global_step"]
    assert state["lr_schedulers"] == other["lr_schedulers"]
    assert state["callbacks"] == other["callbacks"]


def assert_close_to(expected: Path, found: Path) -> None:
    """Weights differ by far less than they were trained; other batches would show."""
    model, _ = bov_lightning.load(expected)
    start = bov_lightning.Transformer(model.config, seed=0).state_dict()
    weights = final_state(found)[0]
    for name, tensor in final_state(expected)[0].items():
        update, error = tensor - start[name], weights[name] - tensor
        assert error.norm() < 0.2 * update.norm() + 1e-6, name


def metrics(run: Path) -> dict[int, dict[str, str]]:
    """The rows of metrics.csv by their step."""
    with open(run / "metrics.csv", newline="") as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def newest(run: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    found = complete_checkpoints(run)
    return step_of(found[-1]) if found else 0


def wait_for(condition: Callable[[], Any], *processes: Any) -> Any:
    """What the condition returns once that is true; none of the processes may end before."""
    while not (found := condition()):
        for process in processes:
            assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        time.sleep(0.002)
    return found
