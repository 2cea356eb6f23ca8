"""Which runs share an axis and a row, and what a row is called."""

import copy
from pathlib import Path

import pytest
from report_material import FINGERPRINTS, VALUES, value_section, write_run

from bov_lightning.errors import UserError
from bov_lightning.report import write_report
from bov_lightning.report.comparison import compare, describe, value_name
from bov_lightning.report.reading import flatten, read_runs


def groups_of(*paths: Path, baseline: str | None = None):
    usable, unusable = read_runs(list(paths))
    assert not unusable
    return compare(usable, baseline)


def test_runs_that_differ_by_their_seed_are_one_row(tmp_path):
    runs = [write_run(tmp_path / f"{v}{s}", v, seed=s, bpb=[2.0, 1.5 + s / 10 - (v == "bov") / 50])
            for s in range(3) for v in ("standard", "bov")]  # fmt: skip
    (group,) = groups_of(*runs)
    standard, bov = group.rows
    assert [row.label for row in group.rows] == ["standard", "bov"]
    assert [run.name for run in bov.runs] == ["bov0", "bov1", "bov2"]
    assert group.baseline is standard
    change = bov.minus(standard, lambda run: run.val_bpb)
    # Seeds differ by 0.1, values by 0.02 in every one of them.
    assert change.value == pytest.approx(-0.02)
    assert change.high - change.low < 1e-9
    assert standard.mean(lambda run: run.val_bpb).value == pytest.approx(1.6)
    assert standard.minus(standard, lambda run: run.val_bpb) is None


def test_unfinished_runs_have_no_part_in_means(tmp_path):
    write_run(tmp_path / "whole", bpb=[2.0, 1.5])
    write_run(tmp_path / "broken", bpb=[9.0], steps=2, seed=1)
    (group,) = groups_of(tmp_path)
    (row,) = group.rows
    assert [run.name for run in row.runs] == ["broken", "whole"]
    assert row.by_seed(lambda run: run.val_bpb) == {0: 1.5}


def test_a_seed_that_ran_twice_counts_once(tmp_path):
    for name, end in (("a", 1.5), ("b", 1.7)):
        write_run(tmp_path / name, bpb=[2.0, end])
    write_run(tmp_path / "c", bpb=[2.0, 2.0], seed=1)
    (group,) = groups_of(tmp_path)
    assert group.rows[0].by_seed(lambda run: run.val_bpb) == pytest.approx({0: 1.6, 1: 2.0})


@pytest.mark.parametrize("name", VALUES)
def test_every_overlay_is_told_by_its_values(name):
    assert value_name(flatten(value_section(name))) == name


def test_values_without_an_overlay_are_described():
    value = flatten(value_section("bov") | {"layers": [2, 4], "coefficient": 0.5})
    assert value_name(value) is None
    assert describe(value) == "bank, layers 2, 4, coefficient 0.5"
    value = flatten(value_section("standard") | {"layers": "every"})
    assert value_name(value) == "standard"


def test_settings_of_a_source_are_part_of_its_values():
    value = flatten(value_section("layer_third") | {"source_args": {"layer": 2}})
    assert value_name(value) is None
    assert describe(value) == "layer, last third, coefficient learned, layer 2"
    value = flatten(value_section("value_embedding_gated_row") | {"gate_channels": 8})
    assert value_name(value) is None
    told = "bank, every second, coefficient gate, plus context, gate channels 8, gate factor 2"
    assert describe(value) == f"{told}, gate inputs x_and_row"


def test_the_control_is_no_row_of_the_standard_values(tmp_path):
    write_run(tmp_path / "standard", "standard")
    write_run(tmp_path / "control", "standard", shape={"d_mlp": "like_bank"})
    write_run(tmp_path / "wider", "standard", shape={"d_mlp": 512})
    (group,) = groups_of(tmp_path)
    told = {row.label: row.value_name for row in group.rows}
    assert told["wide"] == "wide"
    assert list(told.values()).count("standard") == 1
    assert told["standard (d_mlp 512)"] is None


def test_other_recipes_of_the_same_values_are_rows_told_by_what_differs(tmp_path):
    write_run(tmp_path / "narrow")
    write_run(tmp_path / "wide", shape={"d_model": 96})
    write_run(tmp_path / "exact", trainer={"precision": "64-true"})
    # None of these changes what is learned.
    write_run(tmp_path / "other", batch={"tokens": 1024, "micro": 2}, compile=True,
              trainer={"precision": "32-true", "devices": 2})  # fmt: skip
    (group,) = groups_of(tmp_path)
    assert {row.label: [run.name for run in row.runs] for row in group.rows} == {
        "bov (d_model 64, precision 64-true)": ["exact"],
        "bov (d_model 64, precision 32-true)": ["narrow", "other"],
        "bov (d_model 96, precision 32-true)": ["wide"],
    }


@pytest.mark.parametrize(
    "other",
    [
        {"data": FINGERPRINTS | {"tokenizer": "other"}},
        {"data": FINGERPRINTS | {"val_rows": "other"}},
        {"data": {"source": "aa"}},
        {"validation": {"every_steps": 1, "tokens": 640}},
    ],
    ids=["tokenizer", "held-out rows", "unknown", "validation tokens"],
)
def test_what_was_measured_on_other_text_has_axes_of_its_own(tmp_path, other):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", "standard")
    write_run(tmp_path / "c", **copy.deepcopy(other))
    first, second = groups_of(tmp_path)
    assert [run.name for run in first.runs] == ["a", "b"]
    assert [run.name for run in second.runs] == ["c"]
    write_report([tmp_path], tmp_path / "r.md", "md")
    text = (tmp_path / "r.md").read_text()
    assert "bits per byte cannot be compared" in text
    assert "## Group 2: Results" in text


def test_another_training_text_is_another_row_of_the_same_group(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", data=FINGERPRINTS | {"source": "more"})
    (group,) = groups_of(tmp_path)
    assert [row.label for row in group.rows] == [
        "bov (training text aa)",
        "bov (training text more)",
    ]


def test_the_baseline_can_be_named(tmp_path):
    runs = [write_run(tmp_path / f"run-{name}", name) for name in ("bov", "standard")]
    for name in ("standard", "run-standard"):
        (group,) = groups_of(*runs, baseline=name)
        assert group.baseline.label == "standard"
    with pytest.raises(UserError, match="did you mean standard"):
        groups_of(*runs, baseline="standart")


def test_an_unfinished_first_run_is_no_baseline(tmp_path):
    write_run(tmp_path / "a", "standard", bpb=[2.0], steps=3)
    write_run(tmp_path / "b", "bov", bpb=[2.0, 1.9, 1.8])
    (group,) = groups_of(tmp_path)
    assert group.baseline.label == "bov"
