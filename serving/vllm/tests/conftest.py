"""What vLLM is told before it is imported: one thread, no news sent, engines in this process."""

import os
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
    # What vLLM compiles, and what it remembers of models, ends with the tests.
    _cache = tempfile.TemporaryDirectory(prefix="bov-vllm-")
    os.environ["VLLM_CACHE_ROOT"] = _cache.name
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{_cache.name}/inductor"

REPOSITORY = Path(__file__).parents[3]
SHARED = Path(os.environ.get("BOV_SHARED", REPOSITORY.parent / "shared"))


def pytest_sessionstart() -> None:
    """The plugin is there as vLLM finds it: a test must not register it by itself."""
    found = [point.value for point in entry_points(group="vllm.general_plugins")]
    if "bov_vllm:register" not in found:
        pytest.exit("bov-vllm is not installed here: make test-serving installs it", returncode=2)


def pytest_unconfigure() -> None:
    """Removes the cache."""
    if not IS_WORKER:
        _cache.cleanup()
