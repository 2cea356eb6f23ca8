"""`bov sweep --ladder`: tiny real runs, killed and continued, and every mistake in one line."""

import csv
import dataclasses
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from forks import Bov, bov
from ladder_material import NAMES, TINY, result, write
from runs import wait_for

from bov_lightning.cli import main
from bov_lightning.errors import UserError
from bov_lightning.recipe.ladder import read_ladder
from bov_lightning.report.ladder_results import add_result


@pytest.fixture
def ladder(tiny_recipe, workplace) -> Path:
    return write(workplace)


def lines(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "runs.csv", newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_a_ladder_that_was_killed_goes_on_and_what_is_finished_costs_nothing(ladder, capsys):
    command = ["sweep", "--ladder", str(ladder), "--flops-per-second", "1e9"]
    process = Bov(*command, stderr=subprocess.STDOUT, fork_children=True)
    wait_for(lambda: Path("runs.csv").is_file() and len(lines(Path())) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = lines(Path())
    assert 2 <= len(before) < len(NAMES)
    logs = {name: Path("runs", name, "sweep.log").read_text() for name in before}

    assert main(command) == 0
    out = capsys.readouterr().out
    after = lines(Path())
    assert list(after) == NAMES  # whatever order they ended in
    for name in before:
        assert after[name] == before[name]
        assert Path("runs", name, "sweep.log").read_text() == logs[name]
    assert f"{len(before)} of 8 runs finished" in out
    for row in after.values():
        assert 0 < float(row["val_bpb"]) < 10
        assert 0 < float(row["train_bpb"]) < 10
    # The rates that tuning found are those that were used.
    factors = {
        row["rates"] for name, row in after.items() if row["kind"] == "rung" and "low" in name
    }
    assert len(factors) == 1
    assert 0.5 <= float(factors.pop()) <= 2

    # Results alone, without run directories, make the same report and start nothing.
    report = Path("report.md").read_text()
    assert "bov" in report
    assert main([*command, "--run.root", "elsewhere"]) == 0
    assert not Path("elsewhere").exists()
    assert Path("report.md").read_text() == report
    assert main(["sweep", "--ladder", str(ladder), "--report"]) == 0

    # Of another tokenizer: nothing is added to them.
    tokenizer = after[NAMES[0]]["tokenizer"]
    text = Path("runs.csv").read_text().replace(tokenizer, "0123456789abcdef")
    Path("runs.csv").write_text(text)
    capsys.readouterr()
    assert main(command) == 2
    assert "holds runs of tokenizer 0123456789abcdef, and the data given here has" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_the_time_limit_ends_it_and_the_same_command_goes_on(ladder):
    command = ["sweep", "--ladder", str(ladder), "--flops-per-second", "1e9", "--jobs", "2"]
    first = bov(*command, "--time-limit", "0.01", check=True, fork_children=True)
    # A run may have ended before it was told to save.
    left = int(re.search(r"the time is up, (\d) runs are left", first.stderr)[1])
    n_ended = len(list(lines(Path()))) if Path("runs.csv").exists() else 0
    assert 6 <= left == 8 - n_ended
    bov(*command, check=True, fork_children=True)
    assert list(lines(Path())) == NAMES


def test_the_plan_says_what_it_costs_and_trains_nothing(ladder, capsys):
    assert main(["sweep", "--ladder", str(ladder), "--dry-run", "--flops-per-second", "1e6"]) == 0
    out = capsys.readouterr().out
    # 4 x 4e8 and 4 x 8e8 FLOPs, but for whole steps.
    hours = re.search(r"0 of 8 runs finished; about ([\d.]+) hours of one core left", out)
    assert float(hours[1]) == pytest.approx(8 * 6e8 / 1e6 / 3600, rel=0.15)
    assert not Path("runs").exists()
    assert not Path("runs.csv").exists()


def test_speeds_are_measured_of_all_arms_of_a_rung(ladder):
    assert main(["sweep", "--ladder", str(ladder), "--speed"]) == 0
    with open("speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rung"], row["arm"]) for row in rows] == [("low", "standard"), ("low", "bov")]
    assert all(float(row["flops_per_second"]) > 0 for row in rows)


def changed(key: str, index: int, **values) -> dict:
    items = [dict(item) for item in TINY[key]]
    items[index] |= values
    return {key: items}


WIDER = {"model": {"config": {"value": {"source": "context"}, "n_layer": 4}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (changed("rungs", 0, flops=9e8), "rungs are out of order: high (8e+08 FLOPs) comes after"),
        (changed("rungs", 1, name="low"), "rungs: low is given twice"),
        (changed("rungs", 1, config={"sequence_len": 64}), "all rungs share one text"),
        (changed("rungs", 1, batch=100), "not divisible"),
        (changed("rungs", 1, flop=1), "unknown key rungs[1].flop: did you mean rungs[1].flops?"),
        (changed("arms", 1, values="other.yaml"),
         "arm other (other.yaml) sets model.config.n_layer, but arms may differ in model.config."
         "value and model.config.d_mlp alone"),
        (changed("arms", 1, values="nothing"), "recipe values/nothing does not exist"),
        (changed("arms", 1, seeds=[1]), "arm bov has seeds [1]: give a number for each of the 2"),
        (changed("arms", 1, rates_of=None), "arm bov is not tuned: name it in tuning.arms"),
        ({"baseline": "none"}, "baseline names none, but there are: standard, bov"),
        ({"settings": {"model": {"confg": {}}}}, "unknown key model.confg"),
        ({"hypothesis": None}, "hypothesis"),
        ({"verdict": {"arm": "bov", "supported": [{"rule": "is_better"}]}},
         "verdict.supported[0].number is missing"),
        ({"verdict": {**TINY["verdict"], "arm": "standard"}}, "cannot be compared with itself"),
        ({"tuning": {**TINY["tuning"], "factors": [0.5, 2]}}, "1 must be among them"),
    ],
)  # fmt: skip
def test_mistakes_of_the_file_are_one_line(tiny_recipe, workplace, capsys, changes, message):
    Path("other.yaml").write_text(yaml.safe_dump(WIDER))
    path = write(workplace, **changes)
    assert main(["sweep", "--ladder", str(path), "--dry-run", "--flops-per-second", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--values", "bov"], "--values and --ladder: the ladder's file says what is trained"),
        (["--config", "tiny.yaml"], "--config and --ladder"),
        (["--rungs", "top"], "--rungs top: the rungs are low, high"),
        (["--stop-at", "noon"], "--stop-at noon: give a time of day, such as 17:30"),
        (["--time-limit", "0"], "--time-limit is 0.0: above 0"),
        (["--model.config.d_model", "64"], "--model.config.d_model: "),
        (["--output", "tiny.yaml"], "--output tiny.yaml is a file: --ladder writes a folder"),
        (["--report"], "runs.csv holds no runs: without --report they are trained"),
    ],
)
def test_mistakes_of_the_command_are_one_line(ladder, capsys, options, message):
    assert main(["sweep", "--ladder", str(ladder), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "another"}, "holds runs of tokenizer"),
        ({"device": "cuda"}, "holds runs of device"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(ladder, change, message):
    one, two = (result(read_ladder(ladder), "low", "standard", seed, 2.0) for seed in (0, 1))
    add_result(Path(), one, [])
    with pytest.raises(UserError, match=message):
        add_result(Path(), dataclasses.replace(two, **change), [])
    assert list(lines(Path())) == [one.run]


def test_results_of_other_settings_or_another_text_are_refused(ladder, capsys):
    of = read_ladder(ladder)
    one = dataclasses.replace(result(of, "low", "standard", 0, 2.0), run=NAMES[1], kind="tuning")
    add_result(Path(), one, [])
    command = ["sweep", "--ladder", str(ladder), "--dry-run", "--flops-per-second", "1"]
    assert main(command) == 2
    assert f"{NAMES[1]} was trained otherwise than" in capsys.readouterr().err
    Path("runs.csv").write_text("run,kind\nx,y\n")
    assert main(command) == 2
    assert "runs.csv line 2 is no line that bov sweep --ladder writes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_diverges_has_a_line_without_a_number(tiny_recipe, workplace, capsys):
    """For tuning it is as bad as can be; for the baseline the report is refused, in one line."""
    rungs = [rung | {"flops": 2e8 * (i + 1)} for i, rung in enumerate(TINY["rungs"])]
    tuning = TINY["tuning"] | {"factors": [1, 1e30], "limits": [1, 1e30], "check": None}
    path = write(workplace, rungs=rungs, tuning=tuning)
    command = ["sweep", "--ladder", str(path), "--flops-per-second", "1e9", "--rungs", "low"]
    assert main(command) == 0
    rows = lines(Path())
    assert rows["small-low-standard-rates1e+30-seed0"]["val_bpb"] == "nan"
    assert float(rows["small-low-standard-seed0"]["rates"]) == 1
    assert "Diverged, and without a number" in Path("report.md").read_text()

    text = Path("runs.csv").read_text()
    Path("runs.csv").write_text(text.replace(rows["small-low-standard-seed0"]["val_bpb"], "nan"))
    capsys.readouterr()
    assert main([*command, "--report"]) == 2
    error = capsys.readouterr().err
    assert "small-low-standard-seed0, of the baseline, has val_bpb nan" in error
    assert error.count("\n") == 1
