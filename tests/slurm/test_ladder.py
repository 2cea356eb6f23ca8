"""A ladder as jobs of a real SLURM, which take its runs from each other."""

import csv
from pathlib import Path

import pytest
from ladder_material import NAMES, TINY, write
from slurm.cluster import wait_until

from bov_lightning.cli import main

pytestmark = pytest.mark.slurm


def test_jobs_share_the_runs_of_a_ladder(cluster, tiny_recipe, workplace, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    ladder = write(workplace, tuning=TINY["tuning"] | {"factors": [1, 2], "check": None})
    command = ["sweep", "--ladder", str(ladder), "--flops-per-second", "1e9"]
    assert main([*command, "--slurm", "--jobs", "2"]) == 0
    assert capsys.readouterr().out.count("Submitted batch job") == 2

    def ended() -> list[str]:
        if not Path("runs.csv").is_file():
            return []
        with open("runs.csv", newline="") as file:
            return [row["run"] for row in csv.DictReader(file)]

    logs = lambda: "".join(p.read_text() for p in Path("runs").glob("slurm-*.out"))  # noqa: E731
    names = [name for name in NAMES if "rates0.5" not in name and "check" not in name]
    wait_until(lambda: ended() == names, "all runs", 300, details=logs)
    wait_until(lambda: "small" not in cluster.run("squeue", "--noheader", "--format=%j"), "the end")
    assert "Verdict: " in logs()
    assert Path("report.md").is_file()
    # Each was trained once, by one of the two.
    for name in names:
        assert Path("runs", name, "sweep.log").read_text().count("run runs/") == 1, name
