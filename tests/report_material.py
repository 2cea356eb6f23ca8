"""Run directories made for the tests of reports: real recipes and figures, invented curves."""

import csv
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml
from conftest import REPOSITORY

from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.planning.cost import make_plan
from bov_lightning.recipe.sections import BudgetConfig

VALUES = sorted(
    path.stem
    for path in (REPOSITORY / "recipes" / "values").glob("*.yaml")
    if path.stem != "wide"  # the control, whose values are the standard ones
)
SHAPE = {
    "n_layer": 6, "n_head": 2, "n_kv_head": 2, "d_model": 64, "vocab_size": 320,
    "sequence_len": 64, "window_pattern": "L", "document_start": None,
}  # fmt: skip
FINGERPRINTS = {"source": "aa", "tokenizer": "bb", "val_rows": "cc"}


def value_section(name: str) -> dict:
    path = REPOSITORY / "recipes" / "values" / f"{name}.yaml"
    return yaml.safe_load(path.read_text())["model"]["config"]["value"]


@cache
def _plan(text: str) -> dict:
    shape, value, budget, batch_tokens = json.loads(text)
    config = TransformerConfig(**shape, value=ValueConfig(**value))
    return make_plan(config, BudgetConfig(**budget), batch_tokens)


def write_run(
    path: Path,
    value: str | dict = "bov",
    seed: int = 0,
    bpb: Sequence[float] = (2.0, 1.5, 1.4, 1.3),
    steps: int | None = None,
    data: dict | None = None,
    shape: dict | None = None,
    **settings,
) -> Path:
    """A run of one measured step per value of ``bpb``; ``steps`` planned, all if not given."""
    value = value_section(value) if isinstance(value, str) else value
    shape = SHAPE | (shape or {})
    budget = {"flops": None, "tokens": None, "tokens_per_param": None, "steps": steps or len(bpb)}
    recipe = {
        "model": {"config": {**shape, "value": value}, "optimizer": {"matrix_lr": 0.02},
                  "budget": budget},
        "batch": {"tokens": 1024, "micro": 4},
        "run": {"name": path.name, "root": str(path.parent)},
        "seed": seed,
        "validation": {"every_steps": 1, "tokens": None},
        "trainer": {"precision": "32-true"},
    } | settings  # fmt: skip
    plan = _plan(json.dumps([shape, value, recipe["model"]["budget"], recipe["batch"]["tokens"]]))
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    facts = {"device": "cpu", "world_size": 2, "git_commit": None, "data": data or FINGERPRINTS}
    (path / "run.json").write_text(json.dumps(facts | plan))
    with open(path / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["step", "train_loss", "tokens_per_s", "tokens", "train_seconds", "val_bpb"]
        )
        for step, x in enumerate(bpb, start=1):
            writer.writerow([step, 3 * x, 100 + step, 1024 * step, 7.5 * step, x])
    return path


def write_evaluation(run: Path, step: int, outcomes: dict[str, list[int]]) -> None:
    """CORE over the given tasks, right (1) or wrong (0) by row, as lm-eval writes it."""
    folder, date = run / "eval" / f"step-{step:08d}", "2026-01-01T00-00-00.000000"
    folder.mkdir(parents=True)
    centred = {task: [(x - 0.25) / 0.75 for x in rows] for task, rows in outcomes.items()}
    mean = {task: sum(rows) / len(rows) for task, rows in centred.items()}
    core = {"centered,none": sum(mean.values()) / len(mean)}
    accuracy = {
        task: {"acc,none": sum(rows) / len(rows), "centered,none": mean[task],
               "sample_len": len(rows)}
        for task, rows in outcomes.items()
    }  # fmt: skip
    files = {"core_arc_easy": "world_knowledge/a.jsonl", "core_boolq": "reading/b.jsonl"}
    results = {
        "results": {**accuracy, "core_paper": core},
        "groups": {"core_paper": core},
        "group_subtasks": {"core_paper": list(outcomes)},
        "configs": {task: {"metadata": {"file": files[task]}} for task in outcomes},
        "evaluation": {
            "settings": {"tasks": ["core_paper"], "max_per_task": None}, "step": step,
            "cropped_prompts": {}, "rows_left_out": {}, "fewer_shots": {}, "max_length": 64,
        },
    }  # fmt: skip
    (folder / f"results_{date}.json").write_text(json.dumps(results))
    for task, rows in outcomes.items():
        lines = [
            json.dumps({"doc_id": i, "doc": {"q": "?"}, "acc": x, "centered": c})
            for i, (x, c) in enumerate(zip(rows, centred[task], strict=True))
        ]
        (folder / f"samples_{task}_{date}.jsonl").write_text("\n".join(lines) + "\n")


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
