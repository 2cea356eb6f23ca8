"""`bov sweep --ladder`: tiny real runs, killed and continued, and every mistake in one line."""

import csv
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from forks import Bov
from runs import wait_for

from bov_lightning.cli import main
from bov_lightning.report.ladder_results import read_results

CONDITION = {"number": 1.0, "against": ["standard"]}
TINY = {
    "name": "small",
    "recipe": "tiny.yaml",
    "hypothesis": "A bank is better.",
    "baseline": "standard",
    "precision": {"cpu": "32-true"},
    "settings": {"checkpoint": {"every_steps": 2, "keep_last": 1}},
    "rungs": [
        {"name": "low", "flops": 4e8, "batch": 256, "micro": 4, "config": {"d_model": 32}},
        {"name": "high", "flops": 8e8, "batch": 256, "micro": 4, "config": {"d_model": 48}},
    ],
    "arms": [
        {"values": "standard", "seeds": [1, 1]},
        {"values": "bov", "seeds": [1, 1], "rates_of": "standard"},
    ],
    "tuning": {
        "rungs": ["low"], "arms": ["standard"], "rates": ["matrix_lr", "table_lr"],
        "factors": [0.5, 1, 2], "table_factors": [], "limits": [0.5, 2], "check": "high",
    },
    "speed": {"rungs": ["low"], "rounds": 2},
    "verdict": {
        "arm": "bov",
        "supported": [{"rule": "multiplier_above", **CONDITION}],
        "refuted": [{"rule": "multiplier_at_most", **CONDITION, "rungs": "top"}],
    },
}  # fmt: skip
NAMES = [
    *(f"small-low-standard-rates{factor}-seed0" for factor in ("0.5", "1", "2")),
    "small-low-standard-seed0", "small-low-bov-seed0", "small-high-standard-check-seed0",
    "small-high-standard-seed0", "small-high-bov-seed0",
]  # fmt: skip


def write(folder: Path, **changes) -> Path:
    """The tiny ladder, with other values for some of its keys."""
    path = folder / "ladder.yaml"
    path.write_text(yaml.safe_dump(TINY | changes, sort_keys=False))
    return path


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
    factors = {row["rates"] for name, row in after.items() if row["kind"] == "rung" and "low" in name}
    assert len(factors) == 1
    assert 0.5 <= float(factors.pop()) <= 2

    # Results alone, without run directories, make the same report and start nothing.
    report = Path("report.md").read_text()
    assert "bov" in report
    assert main([*command, "--run.root", "elsewhere"]) == 0
    assert not Path("elsewhere").exists()
    assert Path("report.md").read_text() == report
    assert main(["sweep", "--ladder", str(ladder), "--report"]) == 0


