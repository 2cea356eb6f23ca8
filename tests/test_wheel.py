"""The built wheel brings the recipes along and works away from the checkout."""

import copy
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

LOOK = """
import bov_lightning, data_modules
from bov_lightning.cli import main
from evaluation.runner import TASKS
print(bov_lightning.__file__)
assert len([*TASKS.rglob("*.yaml")]) == 27
assert main(["recipes"]) == 0
"""


@pytest.mark.slow
def test_installed_wheel_trains_a_packaged_recipe(tmp_path, tiny_settings):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels, site, work = tmp_path / "wheels", tmp_path / "site", tmp_path / "work"
    work.mkdir()
    subprocess.run(
        [*command, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(REPOSITORY)], check=True
    )
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site)

    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=work, env=environment, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip

    where, *recipes = run("-c", LOOK).split()
    assert Path(where).is_relative_to(site)
    assert "quickstart" in recipes
    data = copy.deepcopy(tiny_settings["data"])
    data["init_args"]["directory"] = "packed"
    small = {
        "model": {"config": {"n_layer": 3, "d_model": 32, "vocab_size": 300, "sequence_len": 32},
                  "budget": {"steps": 2}},
        "batch": {"tokens": 256, "micro": 4},
        "data": data,
    }  # fmt: skip
    (work / "small.yaml").write_text(yaml.safe_dump(small))
    out = run(
        "-m", "bov_lightning.cli", "fit", "--config", "recipes/quickstart.yaml",
        "--config", "values/standard", "--config", "small.yaml",
    )  # fmt: skip
    assert "val_bpb" in out
    assert (work / "runs" / "quickstart-standard-small" / "config.yaml").is_file()
    assert "1 run in 1 row" in run("-m", "bov_lightning.cli", "report", "runs")
    assert "<td" in (work / "report.html").read_text()
