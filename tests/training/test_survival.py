"""Whatever happens to a run or to its checkpoints, the same command brings it to the same end."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from forks import Bov, bov
from runs import assert_same_end, fit, metrics, newest
from safetensors import safe_open
from safetensors.torch import save_file

from bov_lightning.checkpoint.directory import (
    MARKER,
    WEIGHTS,
    complete_checkpoints,
    damaged_file,
    file_facts,
    list_files,
    problem,
    step_of,
    write_marker,
)
from bov_lightning.cli import main


def command(recipe: Path, name: str, *options: str) -> list[str]:
    return ["fit", "--config", str(recipe), "--run.name", name, *options]


def truncate(checkpoint: Path) -> str:
    file = max((checkpoint / "weights").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    return "bytes instead of"


def remove_a_shard(checkpoint: Path) -> str:
    min((checkpoint / "optimizer").iterdir()).unlink()
    return "is missing"


def remove_the_marker(checkpoint: Path) -> str:
    (checkpoint / MARKER).unlink()
    return "was not written to its end"


def garble_the_marker(checkpoint: Path) -> str:
    (checkpoint / MARKER).write_bytes(b"\xff\x00{" * 100)
    return "checkpoint.json"


def make_the_marker_a_list(checkpoint: Path) -> str:
    (checkpoint / MARKER).write_text('{"step": 8, "files": [1, 2]}')
    return "checkpoint.json"


def flip_a_bit(checkpoint: Path) -> str:
    file = max((checkpoint / "optimizer").iterdir())
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    return "is damaged"


def garble_the_header(checkpoint: Path) -> str:
    """As if whoever wrote it had written it so: checksums agree."""
    file = max((checkpoint / "weights").iterdir())
    content = file.read_bytes()
    file.write_bytes(b"\xff" * 16 + content[16:])
    declare_complete(checkpoint)
    return "cannot be read"


def garble_the_training_state(checkpoint: Path) -> str:
    (checkpoint / "training.pt").write_bytes(b"PK\x03\x04 no archive")
    declare_complete(checkpoint)
    return "cannot be read"


def declare_complete(checkpoint: Path) -> None:
    (checkpoint / MARKER).unlink()
    facts = file_facts(checkpoint, list_files(checkpoint))
    write_marker(checkpoint, step_of(checkpoint), facts)


DAMAGE = [truncate, remove_a_shard, remove_the_marker, garble_the_marker, make_the_marker_a_list,
          flip_a_bit, garble_the_header, garble_the_training_state]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_skipped_with_the_reason(
    damage, tiny_recipe, trained, tiny_run, capsys
):
    found = complete_checkpoints(tiny_run)
    reasons = [damage(found[-1])]
    if damage is not remove_the_marker:
        reasons.append(remove_the_marker(found[-2]))
    before = {path: path.read_bytes() for path in found[0].rglob("*") if path.is_file()}
    capsys.readouterr()
    fit(tiny_recipe)
    error = capsys.readouterr().err
    for path, reason in zip(reversed(found), reasons, strict=False):
        assert f"skipped {path}" in error
        assert reason in error
    assert f"from step {step_of(found[-1 - len(reasons)])} " in error
    assert_same_end(trained, tiny_run)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_without_a_usable_checkpoint_is_not_started_over(tiny_recipe, tiny_run, capsys):
    *others, only = complete_checkpoints(tiny_run)
    for path in others:
        shutil.rmtree(path)
    flip_a_bit(only)
    assert main(["fit", "--config", str(tiny_recipe)]) == 2
    error = capsys.readouterr().err
    assert "is damaged" in error
    assert "--resume never" in error
    assert problem(only) is None
    assert damaged_file(only) is not None


@pytest.mark.slow
def test_files_that_may_not_be_read_are_skipped(tiny_recipe, tiny_run):
    last, previous = complete_checkpoints(tiny_run)[-1:-3:-1]
    max((last / "weights").iterdir()).chmod(0)
    again = [sys.executable, "-m", "bov_lightning.cli", *command(tiny_recipe, "tiny")]
    if os.geteuid() == 0:
        # Without the capabilities by which root may read everything.
        rights = "-dac_override,-dac_read_search"
        again = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *again]
    result = subprocess.run(again, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"skipped {last}" in result.stderr
    assert "Permission denied" in result.stderr
    assert f"from step {step_of(previous)} " in result.stderr


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint_that_there_was(tiny_recipe, trained, workplace):
    """A real file system that has room for one checkpoint, and for a second one later."""
    disk = workplace / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in trained.rglob("*") if path.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size // 4 + 500_000}", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        filled = command(tiny_recipe, "tiny", "--run.root", str(disk))
        first = bov(*filled)
        assert first.returncode == 74
        assert "step-00000004 cannot be written" in first.stderr
        assert "Traceback" not in first.stderr
        assert newest(disk / "tiny") == 2
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        second = bov(*filled, check=True)
        assert "from step 2 " in second.stderr
        assert_same_end(trained, disk / "tiny")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


LONGER = ("--model.budget.steps", "45", "--checkpoint.every_steps", "7", "--validation.every_steps",
          "5", "--batch.micro", "2", "--trainer.log_every_n_steps", "1")  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_settings, tmp_path_factory) -> Path:
    """The run of `LONGER`, which nothing disturbs."""
    with contextlib.chdir(tmp_path_factory.mktemp("whole")):
        recipe = Path("tiny.yaml")
        recipe.write_text(yaml.safe_dump(tiny_settings, sort_keys=False))
        return fit(recipe, *LONGER).resolve()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143)])
def test_signals_lose_no_step_wherever_they_come(number, code, tiny_recipe, whole):
    """At the start first; then in training, validation or a save: most time goes into those."""
    stopped, chance, n_stop = Path("runs/stopped"), random.Random(int(number)), 0
    # An interpreter that imports torch when the first signal comes; forks are further then.
    start = interpreter if number == signal.SIGUSR1 else Bov
    while newest(stopped) < 45 and n_stop < 3:
        before, n_row = newest(stopped), len(rows_of(stopped))
        process = start(*command(tiny_recipe, "stopped", *LONGER))
        while n_stop and len(rows_of(stopped)) <= n_row and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.5))
        process.send_signal(number)
        time.sleep(chance.uniform(0, 0.2))
        # A second signal changes nothing.
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate()
        start = Bov
        n_stop += 1
        if process.returncode == code:
            said = int(error[error.index("stopped at step ") :].split()[3])
            assert newest(stopped) == said >= before
        else:
            # Ended before, or not listening yet, with nothing to lose.
            assert process.returncode in (0, -number), error
            assert newest(stopped) == (before if process.returncode else 45)
    fit(tiny_recipe, *LONGER, "--run.name", "stopped")
    assert_same_end(whole, stopped)
    assert metrics(whole).keys() == metrics(stopped).keys()
    for step, row in metrics(whole).items():
        for column in ("train_loss", "val_bpb", "grad_norm"):
            assert row[column] == metrics(stopped)[step][column], (step, column)


def interpreter(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "bov_lightning.cli", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def rows_of(run: Path) -> list[str]:
    path = run / "metrics.csv"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_kill_at_random_moments_ends_as_undisturbed(tiny_recipe):
    """The short form of `make soak`: saves take about as long as the steps between them."""
    from soak import kill_series

    options = ("--model.budget.steps", "80", "--checkpoint.every_steps", "2")
    options += ("--checkpoint.keep_last", "3", "--validation.every_steps", "100")
    whole = fit(tiny_recipe, *options, "--run.name", "whole")
    start = partial(Bov, *command(tiny_recipe, "killed", *options))
    killed = kill_series(start, Path("runs/killed"), n_kill=3, seconds=2)
    assert killed.n_kill >= 1
    assert_same_end(whole, Path("runs/killed"))


def test_gradients_that_are_never_finite_end_the_run(tiny_recipe, tiny_run, capsys):
    """Weights that have grown beyond all bounds; the checkpoint that holds them stays as it is."""
    checkpoint = tiny_run / "checkpoints/step-00000008"
    (file,) = (checkpoint / WEIGHTS).glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        names, facts = stored.keys(), stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in names}
    tensors["blocks.0.mlp.input.weight"] *= 1e30
    save_file(tensors, file, facts)
    declare_complete(checkpoint)
    before = file_facts(checkpoint, list_files(checkpoint))
    options = ["--model.budget.steps", "20", "--guard.max_skipped_steps", "3"]
    assert main(["fit", "--config", str(tiny_recipe), *options]) == 2
    error = capsys.readouterr().err
    assert "is skipped, its gradients are not finite (1 in a row, 1 in all)" in error
    last = error.splitlines()[-1]
    assert last.startswith("bov: error: the gradients of 3 steps in a row")
    assert before == file_facts(checkpoint, list_files(checkpoint))


def test_a_loss_that_stands_out_is_reported_once(tiny_recipe, capsys):
    """Ordinary noise is none; a hundred times the deviation is."""
    from types import SimpleNamespace

    from bov_lightning.recipe.sections import GuardConfig
    from bov_lightning.training.callbacks.guard import LossGuard

    guard = LossGuard(GuardConfig())
    optimizer = SimpleNamespace(n_skipped=0, n_skipped_in_row=0, gradient_norm=1.0)
    noise = random.Random(0)
    losses = [3 + noise.gauss(0, 0.1) for _ in range(300)]
    losses[250] = 13.0
    for step, loss in enumerate(losses, start=1):
        trainer = SimpleNamespace(
            global_step=step, optimizers=[optimizer], is_global_zero=True,
            strategy=SimpleNamespace(agree=lambda own: (own, 0)),
        )  # fmt: skip
        guard.on_train_batch_end(trainer, SimpleNamespace(train_loss=loss), None, None, 0)
    assert guard.n_spike == 1
    assert "the loss at step 251 is 13.0000" in capsys.readouterr().err
    assert guard.mean == pytest.approx(3, abs=0.05)
