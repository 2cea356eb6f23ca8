"""What all tests share: one thread, the reference folder where it is there, and a tiny recipe."""

import contextlib
import gc
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from forks import workers
from leftovers import no_process_left  # noqa: F401 (a fixture of every test)

from bov_lightning.cli import main
from bov_lightning.model import lookup
from data_modules.sources import cut_at_lines

if TYPE_CHECKING:
    import torch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
MAY_HAVE_A_GPU = any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")))
# Has Triton's kernels interpreted where nothing compiles them, whoever imports Triton first.
if not MAY_HAVE_A_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
# What is imported stays: to look through it again and again is a fifth of the fast suite's time.
gc.disable()


def pytest_collection_finish() -> None:
    """From here on garbage is collected, among what the tests make."""
    gc.enable()
    gc.freeze()


REQUIRED = set(filter(None, os.environ.get("BOV_REQUIRE", "").split(",")))
REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("BOV_SHARED", REPOSITORY.parent / "shared"))


def pytest_configure(config: pytest.Config) -> None:
    """Properties are not timed. The process that only hands tests out (-n) imports nothing."""
    if getattr(config.option, "numprocesses", None):
        return
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow]
    settings.register_profile("untimed", deadline=None, suppress_health_check=slow)
    settings.load_profile("untimed")
    if MAY_HAVE_A_GPU:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list) -> None:
    """Has tests run in forks of a process that has imported torch; CUDA cannot be forked."""
    if sys.platform == "linux" and not MAY_HAVE_A_GPU:
        stack = contextlib.ExitStack()
        config.add_cleanup(stack.close)
        python = stack.enter_context(workers())
        for spec in specs:
            spec.python = python


def require(condition: bool, name: str, reason: str) -> None:
    """Skips the test, or fails it where BOV_REQUIRE names what is missing."""
    if not condition:
        (pytest.fail if name in REQUIRED else pytest.skip)(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numbers made by the paper's authors' code."""
    require((SHARED / "parity" / "parity.json").is_file(), "shared", f"{SHARED} is not there")
    return SHARED


@pytest.fixture(scope="session")
def device() -> "torch.device":
    """The GPU, or the CPU where there is none: the same lines run on both."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if "gpu" in REQUIRED:
        pytest.fail("torch finds no GPU here")
    return torch.device("cpu")


@pytest.fixture(scope="session")
def tiny_settings(tmp_path_factory) -> dict:
    """A recipe that trains on a little real text in a second; its data is prepared once."""
    folder = tmp_path_factory.mktemp("data")
    library = Path(sysconfig.get_paths()["stdlib"])
    for split, names in {"train": ("argparse", "typing", "ast"), "val": ("csv", "shlex")}.items():
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for name in names:
                text = (library / f"{name}.py").read_text(encoding="utf-8")
                for piece in cut_at_lines(text, 60):
                    file.write(json.dumps({"text": piece}) + "\n")
    return {
        "model": {
            "config": {
                "n_layer": 3, "n_head": 2, "n_kv_head": 1, "d_model": 32, "vocab_size": 300,
                "sequence_len": 32, "window_pattern": "L",
                "value": {
                    "source": "bank", "layers": "last_third", "coefficient": "learned",
                    "add_context": False, "shared": False,
                },
            },
            "optimizer": {"warmup_steps": 3, "weight_decay": 0.1},
            "budget": {"steps": 8},
        },
        "batch": {"tokens": 256, "micro": 4},
        "run": {"name": "tiny"},
        "checkpoint": {"every_steps": 2, "keep_last": 100},
        "validation": {"every_steps": 3, "tokens": 640},
        "data": {
            "class_path": "data_modules.PackedDataModule",
            "init_args": {
                "directory": str(folder / "packed"),
                "source": {
                    "class_path": "data_modules.TextFiles",
                    "init_args": {
                        "train": [str(folder / "train.jsonl")],
                        "val": [str(folder / "val.jsonl")],
                    },
                },
                "tokenizer": {"vocab_size": 300},
            },
        },
        "trainer": {"accelerator": "cpu", "devices": 1},
    }  # fmt: skip


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def modules_as_they_were():
    """Where Python looks for modules, and the value sources that it knows, are no test's legacy."""
    path = [*sys.path]
    yield
    sys.path[:] = path
    # Those whose module a test has taken away again.
    lookup._all[:] = [
        cls for cls in lookup._all if not lookup.is_own(cls) or cls.__module__ in sys.modules
    ]


@pytest.fixture
def tiny_recipe(tiny_settings, workplace) -> Path:
    """The tiny recipe as a file in the current directory."""
    path = workplace / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_settings, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def trained(tiny_settings, tmp_path_factory) -> Path:
    """The tiny recipe's run, for tests that need some run; nobody writes to it."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder):
        Path("tiny.yaml").write_text(yaml.safe_dump(tiny_settings, sort_keys=False))
        assert main(["fit", "--config", "tiny.yaml"]) == 0
    return folder / "runs" / "tiny"


@pytest.fixture
def tiny_run(trained, workplace) -> Path:
    """A copy of that run where `bov fit` would have left it; with `tiny_recipe` it goes on."""
    return shutil.copytree(trained, Path("runs/tiny"))
