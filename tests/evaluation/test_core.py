"""CORE as the paper's authors score it: every row, by every way of computing it."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from forks import Call
from processes import in_processes
from torch.distributed.fsdp import fully_shard

from bov_lightning.errors import UserError
from evaluation.command import load_model
from evaluation.runner import TASKS, Benchmarks, Runtime, load_tasks, run
from evaluation.scorer import Score

SHORT = ("copa", "commonsense_qa", "openbook_qa", "lambada_openai", "winograd", "winogrande",
         "bigbench_operators", "bigbench_qa_wikidata")  # fmt: skip
"""Tasks of every kind whose prompts are short."""
TASK_NAMES = tuple(f"core_{name}" for name in SHORT)
FEW = 16
"""Rows of each, where two ways of computing are compared score by score."""


def benchmarks_for(shared: Path, tasks: tuple[str, ...], n_row: int = 60) -> Benchmarks:
    return Benchmarks(tasks, n_row, str(shared / "eval_bundle"))


def expected_rows(shared: Path) -> dict[str, list[int]]:
    tasks = json.loads((shared / "parity" / "core" / "expected.json").read_text())["tasks"]
    return {f"core_{name}": task["correct"] for name, task in tasks.items()}


def found_rows(results: dict) -> dict[str, list[int]]:
    return {t: [int(s["acc"]) for s in samples] for t, samples in results["samples"].items()}


def score(shared: Path, tasks: tuple[str, ...], n_row: int = 60, **runtime) -> dict:
    model, backend, tokenizer = load_model(str(shared / "parity" / "core"), "cpu", torch.float32)
    if runtime.pop("sharded", False):
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return run(model, backend, tokenizer, benchmarks_for(shared, tasks, n_row), Runtime(**runtime))


def found_scores(results: dict) -> dict[str, list[tuple[float, int, int]]]:
    """Of every choice of every row: log-probability, tokens, bytes."""
    return {
        task: [
            (score.logprob, score.n_token, score.n_byte)
            for sample in samples for score in sample["filtered_resps"]
        ]
        for task, samples in results["samples"].items()
    }  # fmt: skip


def score_on_rank(rank: int, world: int, shared: str, sharded: bool) -> dict[str, list]:
    return found_scores(score(Path(shared), TASK_NAMES, FEW, sharded=sharded))


@pytest.fixture(scope="module")
def scores(shared) -> dict[str, list[tuple[float, int, int]]]:
    """A few rows of short tasks as all rows below are computed, which are the authors'."""
    return found_scores(score(shared, TASK_NAMES, FEW))


def assert_same(found: dict[str, list], expected: dict[str, list]) -> None:
    assert found.keys() == expected.keys()
    for task, scored in expected.items():
        assert len(scored) >= FEW
        for one, other in zip(found[task], scored, strict=True):
            assert list(one[1:]) == list(other[1:]), task
            assert one[0] == pytest.approx(other[0], abs=1e-3), task


@pytest.mark.slow
def test_all_rows_of_all_tasks(shared):
    results = score(shared, ("core_paper",))
    found, expected = found_rows(results), expected_rows(shared)
    assert found == expected
    assert sum(map(len, found.values())) == 1232
    assert round(results["groups"]["core_paper"]["centered,none"], 4) == 0.0756


@pytest.mark.slow
@pytest.mark.parametrize(
    "runtime", [{"budget": 256}, {"budget": 8192, "share_prefix": False}],
    ids=["budget 256", "no sharing"],
)  # fmt: skip
def test_batches_and_sharing_change_no_score(runtime, shared, scores):
    assert_same(found_scores(score(shared, TASK_NAMES, FEW, **runtime)), scores)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "a model each"])
def test_two_ranks_score_alike(sharded, shared, scores):
    for found in in_processes(2, score_on_rank, str(shared), sharded):
        assert_same(found, scores)


def lm_eval(command: list[str]) -> None:
    sys.argv = command
    runpy.run_module("lm_eval", run_name="__main__")


@pytest.mark.slow
def test_stock_model_of_lm_eval_agrees_row_by_row(shared, tmp_path):
    """The command of lm-eval itself, with its own model; tasks of every kind."""
    pytest.importorskip("accelerate", reason="lm-eval's own model needs it")
    tasks = [f"core_{name}" for name in ("copa", "lambada_openai", "winograd")]
    command = [
        "lm_eval", "run", "--model", "hf", "--model_args",
        f"pretrained={shared / 'parity' / 'core'},dtype=float32", "--include_path", str(TASKS),
        "--tasks", ",".join(tasks), "--device", "cpu", "--batch_size", "8", "--log_samples",
        "--output_path", str(tmp_path), "--metadata", f"data_dir={shared / 'eval_bundle'}",
        "max_per_task=60",
    ]  # fmt: skip
    with Call(lm_eval, command) as process:
        assert process.wait() == 0, process.err
    for task in tasks:
        (path,) = tmp_path.rglob(f"samples_{task}_2*.jsonl")
        rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda r: r["doc_id"])
        assert [int(row["acc"]) for row in rows] == expected_rows(shared)[task], task


@pytest.mark.slow
def test_groups_hold_the_21_tasks_with_their_shots_and_baselines(shared):
    protocol = yaml.safe_load((shared / "eval_bundle" / "core.yaml").read_text())["icl_tasks"]
    names = ("core_paper", "core_dclm_v1", "core_dclm_v2")
    loaded = load_tasks(benchmarks_for(shared, names, 30))
    assert set(loaded["groups"]) == set(names)
    assert len(loaded["tasks"]) == 21
    for group in loaded["groups"].values():
        assert group.child_names == [f"core_{task['label']}" for task in protocol]
    for settings in protocol:
        task = loaded["tasks"][f"core_{settings['label']}"]
        assert task.config.num_fewshot == settings["num_fewshot"][0]
        assert task.kind == settings["icl_task_type"]
        assert task.delimiter == settings.get("continuation_delimiter", " ")
    for version, file in (("v1", "eval_meta_data"), ("v2", "eval_meta_data_dclm_2025")):
        with open(shared / "eval_bundle" / f"{file}.csv", newline="") as lines:
            baselines = {row["Eval Task"]: row["Random baseline"] for row in csv.DictReader(lines)}
        for name, task in loaded["tasks"].items():
            expected = float(baselines[name.removeprefix("core_")]) / 100
            assert task.baseline[version] == pytest.approx(expected)


def test_protocols_differ_in_units_and_baselines(shared):
    loaded = load_tasks(benchmarks_for(shared, ("core_commonsense_qa",), 12))
    task = loaded["tasks"]["core_commonsense_qa"]
    doc = {**task.test_docs()[0], "gold": 1}
    # Dearer per byte, cheaper per token.
    scores = [Score(-4.0, False, 2, 8), Score(-6.0, False, 4, 11), *[Score(-99.0, False, 1, 1)] * 3]
    metrics = task.process_results(doc, scores)
    assert metrics["acc"] == 0
    assert metrics["acc_token"] == 1
    assert metrics["centered"] == pytest.approx(-0.2 / 0.8)
    assert metrics["centered_dclm_v1"] == metrics["centered_dclm_v2"] == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("core_arceasy", "core_arc_easy"),
        ("core_papr", "core_paper"),
        pytest.param("hellaswagg", "hellaswag", marks=pytest.mark.slow),
    ],
)
def test_unknown_tasks_name_the_nearest(name, hint):
    with pytest.raises(UserError, match=f"unknown task '{name}'.*{hint}"):
        load_tasks(Benchmarks((name,)))
