"""What tables and plots hold: the numbers of the runs, of the plans, of the paper."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_material import SHAPE, VALUES, read_csv, value_section, write_evaluation, write_run

from bov_lightning.cli import main
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.counting import with_standard_values
from bov_lightning.planning.decoding import meta_cache
from bov_lightning.report import write_report
from bov_lightning.report.content import Plot, Series, thinned
from bov_lightning.report.published import _published


def report(folder: Path, *options: str) -> Path:
    """A report of all runs in a folder as CSV files."""
    out = folder.parent / "csv"
    assert main(["report", str(folder), "--format", "csv", "--output", str(out), *options]) == 0
    return out


def test_numbers_are_those_of_the_runs(tmp_path, capsys):
    folder = tmp_path / "runs"
    random = np.random.default_rng(0)
    for value in ("standard", "bov"):
        for seed in range(3):
            bpb = [2.5, 2.0, *random.normal(1.5, 0.01, 2)]
            write_run(folder / f"{value}{seed}", value, seed, bpb)
    out = report(folder, "--baseline", "standard")
    assert capsys.readouterr().out.strip().endswith("csv: 6 runs in 2 rows")
    metrics = {run.name: read_csv(run / "metrics.csv") for run in folder.iterdir()}
    flops = {run.name: json.loads((run / "run.json").read_text())["flops_per_token"]
             for run in folder.iterdir()}  # fmt: skip

    ends = {v: [float(metrics[f"{v}{s}"][-1]["val_bpb"]) for s in range(3)]
            for v in ("standard", "bov")}  # fmt: skip
    rows = {row["values"]: row for row in read_csv(out / "results.csv")}
    assert rows.keys() == {"standard", "bov"}
    for value, row in rows.items():
        assert float(row["val_bpb"]) == pytest.approx(np.mean(ends[value]))
        assert float(row["val_bpb_low"]) < float(row["val_bpb"]) < float(row["val_bpb_high"])
        assert row["seeds"] == "0, 1, 2"
    change = np.mean(np.subtract(ends["bov"], ends["standard"]))
    assert float(rows["bov"]["difference_to_standard"]) == pytest.approx(change)
    assert rows["standard"]["difference_to_standard"] == ""

    for axis, column in (("tokens", "tokens"), ("train_seconds", "train_seconds")):
        points = read_csv(out / f"val_bpb_against_{axis}.csv")
        assert [(p["series"], float(p[column]), float(p["val_bpb"])) for p in points] == [
            (name, float(row[column]), float(row["val_bpb"]))
            for name in sorted(metrics)
            for row in metrics[name]
        ]
    for point in read_csv(out / "val_bpb_against_flops.csv"):
        tokens = float(point["FLOPs"]) / flops[point["series"]]
        assert f"{tokens:.0f}" in {row["tokens"] for row in metrics[point["series"]]}
    for row in read_csv(out / "cost.csv"):
        assert float(row["device_hours"]) == pytest.approx(4 * 7.5 * 2 / 3600)
        assert float(row["tokens_per_second"]) == 102.5


def test_v_cache_saved_is_what_the_cache_does_not_hold(tmp_path):
    """Against the sizes of real caches, windows left out as the paper does."""
    names = ("standard", "bov", "bov_every_layer", "bov_shared_table", "first_layer")
    for name in names:
        write_run(tmp_path / "runs" / name, name)
    points = read_csv(report(tmp_path / "runs") / "v_cache_saved.csv")
    assert {p["series"] for p in points} == set(names) - {"standard"}
    for point in points[::7]:
        config = TransformerConfig(**SHAPE, value=ValueConfig(**value_section(point["series"])))
        tokens = int(float(point["cached_tokens"]))
        if not tokens:
            continue
        assert tokens == float(point["cached_tokens"])
        sizes = [
            sum(meta_cache(shape, 1, tokens).nbytes_per_layer)
            for shape in (config, with_standard_values(config))
        ]
        facts = json.loads((tmp_path / "runs" / point["series"] / "run.json").read_text())
        saved = sizes[1] - sizes[0] - 2 * facts["params"]["tables"]
        assert float(point["saved_MiB"]) * 2**20 == pytest.approx(saved, abs=1)


def test_parameters_are_split(tmp_path):
    write_run(tmp_path / "runs" / "bov")
    (row,) = read_csv(report(tmp_path / "runs") / "parameters.csv")
    facts = json.loads((tmp_path / "runs" / "bov" / "run.json").read_text())
    assert int(row["parameters_with_standard_values"]) == facts["params"]["baseline"]
    assert int(row["in_value_tables"]) == facts["params"]["tables"] > 0
    assert int(row["live"]) == facts["params"]["live"]


def paper_run(folder: Path, recipe: str, value: str) -> Path:
    settings = yaml.safe_load((REPOSITORY / "recipes" / f"{recipe}.yaml").read_text())
    config = settings["model"]["config"]
    config.pop("value")
    return write_run(
        folder / value, value, shape=config, bpb=[0.9, 0.85], steps=2,
        model=settings["model"] | {"config": config | {"value": value_section(value)}},
        batch=settings["batch"],
    )  # fmt: skip


def finish(run: Path) -> None:
    facts = json.loads((run / "run.json").read_text()) | {"iterations": 2}
    (run / "run.json").write_text(json.dumps(facts))


def test_published_numbers_stand_beside_runs_of_the_papers_recipes(tmp_path):
    for value in ("standard", "bov", "bov_fixed"):
        finish(paper_run(tmp_path / "runs", "bov-780m", value))
    for value in ("standard", "bov"):
        tasks = {"core_arc_easy": [1, 0, 1], "core_boolq": [1, 0, 0, 1]}
        write_evaluation(tmp_path / "runs" / value, 2, tasks)
    out = report(tmp_path / "runs", "--baseline", "standard")
    rows = {row["values"]: row for row in read_csv(out / "results.csv")}
    assert float(rows["bov"]["paper_val_bpb"]) == 0.714
    assert float(rows["bov"]["paper_difference"]) == pytest.approx(-0.008)
    assert rows["bov_fixed"]["paper_val_bpb"] == ""
    cores = {r["values"]: r for r in read_csv(out / "benchmarks_by_category.csv")}
    assert float(cores["bov"]["paper_core_paper"]) == 0.272
    (easy,) = [r for r in read_csv(out / "benchmarks_by_task.csv") if r["task"] == "arc_easy"]
    assert float(easy["paper_bov"]) == 0.72
    assert float(easy["bov"]) == pytest.approx(2 / 3)


def test_published_recipes_are_ours():
    """Every key of published.yaml is in the recipe of that size, and every name an overlay."""
    for entry, name in zip(_published(), ("bov-135m", "bov-780m"), strict=True):
        recipe = yaml.safe_load((REPOSITORY / "recipes" / f"{name}.yaml").read_text())
        for key, value in entry["recipe"].items():
            found = recipe
            for part in key.split("."):
                found = found[part]
            assert found == value, key
        numbers = [entry["val_bpb"], *entry.get("benchmarks", {}).values()]
        assert set().union(*numbers) <= set(VALUES)
        tasks = entry.get("benchmarks", {}).keys() - {"core_paper"}
        folder = REPOSITORY / "evaluation" / "tasks" / "core"
        assert all((folder / f"{task.removeprefix('core_')}.yaml").is_file() for task in tasks)
        assert len(tasks) in (0, 21)


def test_other_recipes_have_no_published_numbers(tmp_path):
    write_run(tmp_path / "runs" / "bov")
    (row,) = read_csv(report(tmp_path / "runs") / "results.csv")
    assert not [name for name in row if "paper" in name]


def test_benchmarks_of_one_run_are_paired_by_row_and_of_seeds_by_seed(tmp_path):
    ours = {"core_arc_easy": [1, 1, 1, 0] * 10, "core_boolq": [1, 0] * 20}
    theirs = {"core_arc_easy": [1, 1, 0, 0] * 10, "core_boolq": [1, 0] * 20}
    folder = tmp_path / "runs"
    for value, outcomes in (("standard", theirs), ("bov", ours)):
        write_evaluation(write_run(folder / f"{value}0", value), 4, outcomes)
    out = report(folder, "--baseline", "standard")
    rows = {r["values"]: r for r in read_csv(out / "benchmarks_by_category.csv")}
    core = rows["bov"]
    assert float(core["core_paper"]) == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert (
        float(core["core_paper_low"]) < float(core["core_paper"]) < float(core["core_paper_high"])
    )
    name = "core_paper_difference_to_standard"
    assert float(core[name]) == pytest.approx(0.25 / 0.75 / 2)
    assert float(core[f"{name}_low"]) > 0
    assert float(core["world_knowledge"]) == 0.75
    assert float(core["reading"]) == 0.5

    for value, outcomes in (("standard", theirs), ("bov", ours)):
        write_evaluation(write_run(folder / f"{value}1", value, seed=1), 4, outcomes)
    rows = {r["values"]: r for r in read_csv(report(folder) / "benchmarks_by_category.csv")}
    # Two seeds that agree: no spread is left.
    assert rows["bov"]["core_paper_low"] == rows["bov"]["core_paper_high"] != ""
    write_report([folder], tmp_path / "r.md", "md")
    assert "CORE differs between runs of one recipe" in (tmp_path / "r.md").read_text()


def test_ablation_compares_bank_of_values_with_its_variants(tmp_path):
    for name, end in (("standard", 1.9), ("bov", 1.5), ("bov_fixed", 1.6)):
        write_run(tmp_path / "runs" / name, name, bpb=[2.0, end])
    out = report(tmp_path / "runs", "--baseline", "standard")
    (variant,) = read_csv(out / "ablation.csv")
    assert variant["series"] == "bov_fixed"
    assert float(variant["difference"]) == pytest.approx(0.1)
    assert [r["val_bpb"] for r in read_csv(out / "val_bpb_ranking.csv")] == ["1.5", "1.6", "1.9"]
    results = {r["values"]: r["difference_to_standard"] for r in read_csv(out / "results.csv")}
    assert results.pop("standard") == ""
    points = read_csv(out / "val_bpb_difference.csv")
    assert {r["series"]: r["difference"] for r in points} == results


def test_a_baseline_without_a_result_leaves_differences_out(tmp_path):
    write_run(tmp_path / "runs" / "whole", bpb=[2.0, 1.5])
    write_run(tmp_path / "runs" / "other", "bov_fixed", bpb=[2.0, 1.6])
    write_run(tmp_path / "runs" / "stopped", "standard", bpb=[2.0], steps=2)
    out = report(tmp_path / "runs", "--baseline", "stopped")
    assert [r["difference_to_standard"] for r in read_csv(out / "results.csv")] == ["", ""]
    assert not (out / "val_bpb_difference.csv").exists()


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 400), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_thinned_lines_keep_measured_points_ends_and_peaks(n, n_line, seed):
    random = np.random.default_rng(seed)
    series = [Series(str(i), i, np.sort(random.random(n)), random.random(n)) for i in range(n_line)]
    plot = Plot("p", "", "", "tokens", "val_bpb", series)
    thin = thinned(plot, n_point=60)
    for before, after in zip(plot.series, thin.series, strict=True):
        points = set(zip(before.x, before.y, strict=True))
        kept = list(zip(after.x, after.y, strict=True))
        assert set(kept) <= points
        assert kept == sorted(kept)
        assert {kept[0], kept[-1]} == {(before.x[0], before.y[0]), (before.x[-1], before.y[-1])}
        assert (after.y.min(), after.y.max()) == (before.y.min(), before.y.max())
        assert len(kept) <= max(42, 60 // n_line + 2) or len(kept) == n
    assert replace(thin, series=plot.series) == plot
