"""Forked commands are what `python -m bov_lightning.cli` is."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forks import SIGNALS, Bov, bov
from runs import assert_same_end, wait_for

from bov_lightning.checkpoint.directory import complete_checkpoints
from bov_lightning.cli import main

pytestmark = pytest.mark.slow


def default_signals() -> None:
    """Where pytest runs in the background, its children would ignore Ctrl-C and more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def signals_of(pid: int) -> list[str]:
    status = Path(f"/proc/{pid}/status").read_text()
    return re.findall(r"Sig(?:Blk|Ign|Cgt):\s*\w+", status)


def test_a_fork_trains_speaks_and_ends_as_an_interpreter_does(tiny_recipe):
    command = ["fit", "--config", str(tiny_recipe), "--model.budget.steps", "24"]
    command += ["--checkpoint.every_steps", "8", "--run.name"]
    assert main(["prepare", "--config", str(tiny_recipe)]) == 0
    said, signals = [], []
    for name in ("forked", "real"):
        with open(name, "w+") as file:
            if name == "forked":
                process = Bov(*command, name, stdout=file, stderr=file)
            else:
                process = subprocess.Popen(
                    [sys.executable, "-m", "bov_lightning.cli", *command, name],
                    stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    preexec_fn=default_signals,
                )  # fmt: skip
            wait_for(lambda name=name: complete_checkpoints(Path("runs") / name), process)
            signals.append(signals_of(process.pid))
            assert process.wait() == 0
        text = Path(name).read_text()
        said.append(re.sub(r"[\d,]+ tokens/s|ETA .*|[\d.]+ min", "", text).replace(name, "NAME"))
    assert_same_end(Path("runs/forked"), Path("runs/real"))
    assert said[0] == said[1]
    assert signals[0] == signals[1]


def test_exit_codes_and_streams():
    for arguments in (["--version"], ["fitt"], ["fit", "--config", "nowhere.yaml"]):
        real = subprocess.run(
            [sys.executable, "-m", "bov_lightning.cli", *arguments], capture_output=True, text=True
        )
        found = bov(*arguments)
        assert (found.returncode, found.stdout, found.stderr) == (
            real.returncode, real.stdout, real.stderr
        )  # fmt: skip
