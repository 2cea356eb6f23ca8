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

USE = """
import bov_lightning, data_modules
from bov_lightning.cli import main
from evaluation.runner import TASKS
print(bov_lightning.__file__)
assert len([*TASKS.rglob("*.yaml")]) == 27
assert main(["recipes"]) == 0
overlays = ["recipes/quickstart.yaml", "values/standard", "small.yaml"]
assert main(["fit", *(word for name in overlays for word in ("--config", name))]) == 0
assert main(["report", "runs"]) == 0
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

    data = copy.deepcopy(tiny_settings["data"])
    data["init_args"]["directory"] = "packed"
    small = {
        "model": {"config": {"n_layer": 3, "d_model": 32, "vocab_size": 300, "sequence_len": 32},
                  "budget": {"steps": 2}},
        "batch": {"tokens": 256, "micro": 4},
        "data": data,
    }  # fmt: skip
    (work / "small.yaml").write_text(yaml.safe_dump(small))
    out = subprocess.run(
        [sys.executable, "-c", USE], cwd=work, env=os.environ | {"PYTHONPATH": str(site)},
        check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    where, *rest = out.split()
    assert Path(where).is_relative_to(site)
    assert {"quickstart", "val_bpb"} <= {*rest}
    assert (work / "runs" / "quickstart-standard-small" / "config.yaml").is_file()
    assert "1 run in 1 row" in out
    assert "<td" in (work / "report.html").read_text()
