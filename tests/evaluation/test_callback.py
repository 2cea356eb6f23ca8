"""Benchmarks during training: there when asked for, and without a trace in the training."""

import contextlib
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forks import Bov, bov
from processes import bov_on_ranks
from runs import wait_for

import bov_lightning
from bov_lightning.checkpoint.directory import complete_checkpoints
from bov_lightning.cli import main
from evaluation.heldout import write_heldout
from evaluation.results import read_results, step_directory

TASKS = ["tiny_choice", "tiny_lm"]


def write_recipe(tiny_settings: dict, tasks_folder: Path) -> Path:
    section = {
        "tasks": TASKS, "every_steps": 2, "data_dir": str(tasks_folder),
        "include_path": str(tasks_folder),
    }  # fmt: skip
    path = Path("evaluated.yaml").absolute()
    path.write_text(yaml.safe_dump({**tiny_settings, "evaluation": section}))
    return path


@pytest.fixture
def recipe(tiny_settings, tasks_folder, workplace) -> Path:
    """The tiny recipe, evaluated every 2 of its 8 steps."""
    return write_recipe(tiny_settings, tasks_folder)


def fit(recipe: Path, name: str, *options: str) -> Path:
    assert main(["fit", "--config", str(recipe), "--run.name", name, *options]) == 0
    return Path("runs") / name


@pytest.fixture(scope="module")
def straight(tiny_settings, tasks_folder, tmp_path_factory) -> Path:
    """The recipe's run, which nothing disturbs and nobody writes to."""
    with contextlib.chdir(tmp_path_factory.mktemp("straight")):
        return fit(write_recipe(tiny_settings, tasks_folder), "run").resolve()


@pytest.fixture
def run(straight, workplace) -> Path:
    """A copy of that run, where it would have been trained."""
    return shutil.copytree(straight, Path("runs/run"))


def claims_of(run: Path, step: int) -> list[Path]:
    return list(run.glob(f"eval/claims/step-{step:08d}-*"))


def evaluated_steps(run: Path) -> dict[int, int]:
    """How many complete results every step has."""
    return {
        int(path.name.removeprefix("step-")): len(read_results(path))
        for path in sorted((run / "eval").glob("step-*"))
    }


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_training(first: Path, second: Path) -> None:
    one, _ = bov_lightning.load(first)
    other, _ = bov_lightning.load(second)
    for (name, tensor), found in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, found), name


@pytest.mark.slow
def test_evaluation_leaves_no_trace_in_the_training(recipe, capsys):
    with_, without = fit(recipe, "with"), fit(recipe, "without", "--evaluation.tasks", "[]")
    assert_same_training(with_, without)
    losses = [{r["step"]: r["train_loss"] for r in rows(run)} for run in (with_, without)]
    assert losses[0]["8"] == losses[1]["8"] != ""
    assert not (without / "eval").exists()

    assert evaluated_steps(with_) == {2: 1, 4: 1, 6: 1, 8: 1}
    assert capsys.readouterr().err.count("tiny_choice 0.") == 4
    for step in (2, 8):
        directory = step_directory(with_, step)
        (results,) = read_results(directory)
        assert results["evaluation"]["step"] == step
        assert results["evaluation"]["settings"]["tasks"] == TASKS
        for task in TASKS:
            (path,) = directory.glob(f"samples_{task}_*.jsonl")
            samples = [json.loads(line) for line in path.read_text().splitlines()]
            assert len(samples) == 14
            mean = sum(sample["acc"] for sample in samples) / 14
            assert results["results"][task]["acc,none"] == pytest.approx(mean)
            (logged,) = [row for row in rows(with_) if row["step"] == str(step)]
            assert float(logged[f"eval/{task}"]) == pytest.approx(mean)
    assert not list(with_.rglob("*.partial"))
    with open(with_ / "eval" / "metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4", "6", "8"]


@pytest.mark.slow
def test_results_are_those_of_the_checkpoint(run, tasks_folder):
    (during,) = read_results(step_directory(run, 4))
    options = ["--data-dir", str(tasks_folder), "--include-path", str(tasks_folder)]
    checkpoint = str(run / "checkpoints" / "step-00000004")
    command = ["evaluate", checkpoint, "--tasks", *TASKS, *options, "--output", "afterwards"]
    assert main(command) == 0
    (after,) = read_results(Path("afterwards"))
    assert after["evaluation"]["step"] == 4
    for task in TASKS:
        assert after["results"][task] == during["results"][task]


@pytest.mark.slow
def test_a_resumed_run_repeats_no_evaluation(recipe, run):
    whole = {path: path.stat().st_mtime_ns for path in (run / "eval").rglob("results_*")}
    for path in complete_checkpoints(run)[2:]:
        path.rename(path.with_name(f".{path.name}.partial"))
    logged = {row["step"]: row["eval/tiny_choice"] for row in rows(run)}
    fit(recipe, "run")
    assert {p: p.stat().st_mtime_ns for p in (run / "eval").rglob("results_*")} == whole
    assert {row["step"]: row["eval/tiny_choice"] for row in rows(run)} == logged


@pytest.mark.slow
def test_an_evaluation_killed_half_way_is_made_up_for(recipe, straight):
    """Killed in the evaluation at step 4, whose checkpoint is written; and in the last one."""
    run = Path("runs/killed")
    for step in (4, 8):
        with Bov("fit", "--config", recipe, "--run.name", "killed") as process:
            wait_for(lambda step=step: claims_of(run, step), process)
    fit(recipe, "killed")
    assert evaluated_steps(run) == evaluated_steps(straight) == {2: 1, 4: 1, 6: 1, 8: 1}
    assert_same_training(straight, run)
    for step in (2, 4, 6, 8):
        (found,), (expected,) = (read_results(step_directory(r, step)) for r in (run, straight))
        assert found["results"] == expected["results"]
    assert not list(run.glob("eval/claims/step-*"))
    assert not list((run / "eval").rglob("*.partial"))


@pytest.mark.distributed
def test_two_processes_find_what_one_finds(recipe):
    one = fit(recipe, "one", "--model.budget.steps", "2")
    bov_on_ranks(
        2, "fit", "--config", str(recipe), "--run.name", "two", "--model.budget.steps", "2"
    )
    (found,), (expected,) = (
        read_results(step_directory(run, 2)) for run in (Path("runs/two"), one)
    )
    assert found["n-samples"] == expected["n-samples"]
    assert evaluated_steps(Path("runs/two")) == {2: 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluation.data_dir", "nowhere"], "nowhere holds no tiny_choice.jsonl"),
        (["--evaluation.tasks", "[core_papr]"], "did you mean core_paper"),
        (["--evaluation.every_steps", "0"], "evaluation.every_steps is 0: at least 1"),
        (["--evaluation.task", "[x]"], "did you mean evaluation.tasks"),
    ],
)
def test_mistakes_are_found_before_training(options, message, recipe, capsys):
    assert main(["fit", "--config", str(recipe), *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs/tiny/checkpoints").exists()


def test_heldout_tasks_are_made_of_the_documents(tokenizer, tmp_path):
    text = "the parser takes an option and the help of the argument is a value of the parser "
    documents = [tokenizer.encode(f"{i} {text}" * 2) for i in range(30)]
    row = [token for ids in documents for token in (0, *ids)]
    rows = np.array(row[: len(row) // 100 * 100]).reshape(-1, 100)
    for name in ("a", "b"):
        write_heldout(tmp_path / name, rows, tokenizer, 0)
    for task in ("last_token", "continuation"):
        content = (tmp_path / "a" / f"{task}.jsonl").read_text()
        assert content == (tmp_path / "b" / f"{task}.jsonl").read_text()
        items = [json.loads(line) for line in content.splitlines()]
        assert len(items) > 8
        source = tokenizer.decode([token for token in rows.flatten().tolist() if token])
        for item in items:
            if task == "last_token":
                assert f"{item['context']} {item['continuation']}" in source
            else:
                assert len(item["choices"]) == 4
                assert f"{item['query']} {item['choices'][item['gold']]}" in source


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1", "2"])
def test_preempted_evaluation_is_made_up_for_where_it_was(devices, recipe, straight):
    """A signal during the evaluation at step 4, which is no multiple of the checkpoints'."""
    command = ["fit", "--config", str(recipe)]
    command += ["--run.name", "told", "--trainer.devices", devices, "--checkpoint.every_steps", "3"]
    # One row per forward, so that there is time for a signal.
    command += ["--evaluation.tokens_per_forward", "1"]
    run = Path("runs/told")
    with Bov(*command, fork_children=True) as process:
        wait_for(lambda: claims_of(run, 4), process)
        process.terminate()
        assert process.wait() == 143, process.err
    if not read_results(step_directory(run, 4)):  # else it was finished before the signal came
        assert complete_checkpoints(run)[-1].name == "step-00000004"
    bov(*command, fork_children=True, check=True)
    assert evaluated_steps(run) == {2: 1, 4: 1, 6: 1, 8: 1}
    if devices == "1":
        assert_same_training(straight, run)
