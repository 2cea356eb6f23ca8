"""A cluster for each file of drills, and a run to drill.

Most of the time SLURM waits, so that the files run side by side (pytest -n 7 --dist loadfile).
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from conftest import require
from slurm.cluster import Cluster, missing_programs
from slurm.job import EVERY


@pytest.fixture(scope="module")
def cluster():
    missing = missing_programs()
    usable = not missing and os.geteuid() == 0
    require(usable, "slurm", f"needs root and {', '.join(missing) or 'nothing else'}")
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    running = Cluster(directory)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def long_recipe(tiny_settings, workplace) -> Path:
    """A run that no test waits for the end of."""
    settings = {
        **tiny_settings,
        "checkpoint": {"every_steps": EVERY, "keep_last": 3, "keep_every": EVERY},
        "validation": {"every_steps": 15, "tokens": 640},
        "batch": {"tokens": 256, "micro": 2},
    }
    settings["model"] = {**settings["model"], "budget": {"steps": 100_000}}
    path = workplace / "long.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path
