"""`bov sweep`: real runs in processes of their own, killed, stopped and continued."""

import csv
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from forks import Bov, bov
from runs import assert_same_end, fit, wait_for

from bov_lightning.checkpoint.directory import complete_checkpoints
from bov_lightning.cli import main

VALUES = ("standard", "bov", "first_layer")
RUNS = [Path("runs") / f"tiny-{value}-seed0" for value in VALUES]


def start(recipe: Path, *options: str) -> Bov:
    """A sweep in a process group of its own; its runs are forks, too."""
    command = ["sweep", "--config", str(recipe), "--values", ",".join(VALUES), "--jobs", "2"]
    return Bov(*command, *options, stderr=subprocess.STDOUT, fork_children=True)


def last_bpb(run: Path) -> float:
    with open(run / "metrics.csv", newline="") as file:
        return float([row["val_bpb"] for row in csv.DictReader(file) if row["val_bpb"]][-1])


def reported(folder: Path) -> dict[str, float]:
    """val_bpb by run, of the report's CSV files."""
    assert main(["report", *map(str, RUNS), "--format", "csv", "--output", str(folder)]) == 0
    with open(folder / "runs.csv", newline="") as file:
        return {row["run"]: float(row["val_bpb"]) for row in csv.DictReader(file)}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_interrupted_ends_as_if_it_had_not_been(tiny_recipe, number):
    """After SIGKILL the runs themselves go on, and the next sweep must not train them twice."""
    steps = ["--model.budget.steps", "12"]
    process = start(tiny_recipe, *steps)
    wait_for(lambda: any(complete_checkpoints(run) for run in RUNS), process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    codes = {signal.SIGKILL: -9, signal.SIGINT: 130}
    assert process.returncode == codes[number], said
    assert ("the same command continues" in said) == (number != signal.SIGKILL)

    again = start(tiny_recipe, *steps)
    said, _ = again.communicate(timeout=400)
    assert again.returncode == 0, said
    assert "runs/tiny-report.html" in said
    assert Path("runs/tiny-report.html").stat().st_size > 0

    numbers = reported(Path("csv"))
    for run in RUNS:
        assert numbers[run.name] == pytest.approx(last_bpb(run), abs=1e-9)
        with open(run / "metrics.csv", newline="") as file:
            steps_of = [int(row["step"]) for row in csv.DictReader(file)]
        assert steps_of == sorted(set(steps_of))

    # One of them, against a run of its own that nothing disturbed.
    flops = yaml.safe_load((RUNS[1] / "config.yaml").read_text())["model"]["budget"]["flops"]
    alone = fit(tiny_recipe, "--config", "values/bov", "--model.budget.flops", str(flops),
                "--run.name", "alone")  # fmt: skip
    assert_same_end(alone, RUNS[1])


@pytest.mark.slow
def test_finished_runs_are_skipped_and_failed_ones_do_not_hold_up_the_others(tiny_recipe):
    broken = Path("broken.yaml")
    broken.write_text(
        yaml.safe_dump({"model": {"config": {"window_pattern": "L"}}, "trainer": {"devices": "x"}})
    )
    arguments = ["sweep", "--config", str(tiny_recipe), "--values", f"{broken},standard"]
    result = bov(*arguments, fork_children=True)
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    assert "1 of 2 runs failed" in error
    assert "runs/tiny-broken-seed0/sweep.log" in error
    standard = Path("runs/tiny-standard-seed0")
    assert (standard / "checkpoints" / "step-00000008").is_dir()

    before = (standard / "sweep.log").read_text()
    again = bov("sweep", "--config", tiny_recipe, "--values", "standard", check=True)
    assert (standard / "sweep.log").read_text() == before
    assert "finished" in again.stdout


def plan(recipe: Path, capsys, *options: str) -> list[list[str]]:
    assert main(["sweep", "--config", str(recipe), "--dry-run", *options]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()[1:]]


@pytest.mark.slow
def test_rows_cost_the_same_whatever_the_budget_is_called(tiny_recipe, capsys):
    values = ["--values", "standard,bov,bov_every_layer"]
    for budget in (["steps", "1000"], ["tokens", "256000"]):
        rows = plan(tiny_recipe, capsys, *values, f"--model.budget.{budget[0]}", budget[1])
        assert [row[0] for row in rows] == [
            f"tiny-{name}-seed0" for name in ("standard", "bov", "bov_every_layer")
        ]
        assert int(rows[0][1].replace(",", "")) == 1000
        flops = [float(row[2]) for row in rows]
        assert max(flops) < min(flops) * 1.001
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--values", "standard,standrad"], "recipe values/standrad does not exist"),
        (["--values", "bov,values/bov.yaml"], "--values: bov is given twice"),
        (["--values", "bov", "--seeds", "1,x"], "--seeds 1,x: give whole numbers"),
        (["--values", "bov", "--jobs", "0"], "--jobs is 0: at least 1"),
        (["--values", "bov", "--model.budget", "null"], "model.budget is not set"),
        (["--values", "bov", "--batch.tokens", "100"], "not divisible"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(tiny_recipe, capsys, options, message):
    assert main(["sweep", "--config", str(tiny_recipe), *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_run_of_that_name_with_other_settings_is_refused(tiny_recipe, capsys):
    arguments = ["sweep", "--config", str(tiny_recipe), "--values", "bov"]
    bov(*arguments, "--model.budget.steps", "2", fork_children=True, check=True)
    assert (
        main([*arguments, "--model.budget.steps", "2", "--model.optimizer.matrix_lr", "0.5"]) == 2
    )
    assert "was trained with model.optimizer.matrix_lr 0.02, not 0.5" in capsys.readouterr().err
    assert main([*arguments, "--model.budget.steps", "1"]) == 2
    assert "has trained 2 steps, but the budget pays for 1" in capsys.readouterr().err
