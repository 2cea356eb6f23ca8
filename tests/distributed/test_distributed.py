"""Runs on real ranks: however many there are and however they share, the same training."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import Bov
from optim.test_sharded import make
from processes import BovOnRanks, bov_on_ranks, in_processes
from runs import assert_same_end, fit, metrics

from bov_lightning.checkpoint import directory as checkpoints
from bov_lightning.checkpoint import writing as saving
from bov_lightning.checkpoint.directory import OPTIMIZER, WEIGHTS, complete_checkpoints
from bov_lightning.checkpoint.reading import read_whole
from bov_lightning.checkpoint.resuming import optimizer_state_of, random_state, restore, weights_of
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW

# d_model 36 over 2 ranks is even, a padded vocabulary of 64 rows over 3 is not.
CONFIG = TransformerConfig(
    n_layer=3, n_head=3, n_kv_head=3, d_model=36, vocab_size=60, sequence_len=32,
    value=ValueConfig("bank", "last_third", "learned"),
)  # fmt: skip


def fit_on(world: int, recipe: Path, name: str, *options: str) -> Path:
    """A run of several processes."""
    bov_on_ranks(world, "fit", "--config", str(recipe), *options, "--run.name", name)
    return Path("runs") / name


FIFTY = ("--model.budget.steps", "50", "--checkpoint.every_steps", "50", "--batch.micro", "4",
         "--validation.every_steps", "50", "--trainer.log_every_n_steps", "1",
         "--model.optimizer.muon_dtype", "float32")  # fmt: skip
LAYOUTS = {
    "ddp": ("--trainer.strategy", "ddp"),
    "fsdp": (),
    "fsdp-accumulated": ("--batch.micro", "2"),
}


@pytest.mark.distributed
def test_losses_of_fifty_steps_agree(tiny_recipe):
    """In fp32, the learning rates those of the recipe: one process against two, in every way."""
    expected = metrics(fit(tiny_recipe, *FIFTY, "--run.name", "one"))
    assert len(expected) == 50
    for name, options in LAYOUTS.items():
        found = metrics(fit_on(2, tiny_recipe, name, *FIFTY, *options))
        for step, row in expected.items():
            loss = float(row["train_loss"])
            assert float(found[step]["train_loss"]) == pytest.approx(loss, abs=1e-5), (name, step)
        assert float(found[50]["val_bpb"]) == pytest.approx(
            float(expected[50]["val_bpb"]), abs=1e-5
        )


def objects(world: int) -> tuple:
    model = make(CONFIG, world)
    return model, MuonAdamW(build_groups(model, OptimizerConfig(), CONFIG, 0))


def write(ranks: Ranks, run: Path, model, optimizer, step: int) -> None:
    run.mkdir(exist_ok=True)
    writer = saving.CheckpointWriter(run, "model: {}", ranks)
    state = optimizer_state_of(model, optimizer)
    state |= random_state(ranks.rank, torch.device("cpu"))
    rest = {"global_step": step}
    writer.start(step, weights_of(model), state, rest, lambda: None)
    # The copy is what counts: what training does meanwhile must not show.
    for parameter in model.parameters():
        parameter.data.mul_(2)
    assert writer.wait()


def train_and_write(rank: int, world: int, run: Path) -> None:
    model, optimizer = objects(world)
    rows = torch.randint(0, 60, (12, 33), generator=torch.Generator().manual_seed(0))[rank::world]
    for _ in range(2):
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    write(ranks_of(world), run, model, optimizer, 2)


def read_and_write(rank: int, world: int, run: Path, copy: Path) -> None:
    model, optimizer = objects(world)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    ranks = ranks_of(world)
    path, rest, messages = restore(run, model, optimizer, ranks, torch.device("cpu"))
    assert rest == {"global_step": 2}
    assert messages == [f"resuming {run} from step 2 ({path})"]
    write(ranks, copy, model, optimizer, 2)


def ranks_of(world: int) -> Ranks:
    return Ranks(torch.distributed.new_group(backend="gloo") if world > 1 else None)


def run_in(world: int, work, *arguments) -> None:
    if world == 1:
        work(0, 1, *arguments)
    else:
        in_processes(world, work, *arguments)


@pytest.mark.distributed
@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 2), (3, 2), (2, 3)])
def test_checkpoints_reshard_bit_for_bit(writers, readers, tmp_path):
    """Written by some ranks, read by others, written again: nothing changes on the way."""
    first, second = tmp_path / "first", tmp_path / "second"
    run_in(writers, train_and_write, first)
    run_in(readers, read_and_write, first, second)
    (written,), (copied,) = complete_checkpoints(first), complete_checkpoints(second)
    for part in (WEIGHTS, OPTIMIZER):
        expected, found = read_whole(written / part), read_whole(copied / part)
        names = [name for name in expected if not name.startswith("random.")]
        assert set(names) == {name for name in found if not name.startswith("random.")}
        for name in names:
            assert torch.equal(expected[name], found[name]), name
    assert checkpoints.damaged_file(copied) is None


@pytest.mark.distributed
def test_two_ranks_continue_bit_for_bit(tiny_recipe):
    options = ("--trainer.log_every_n_steps", "1")
    parts = fit_on(2, tiny_recipe, "parts", *options)
    whole = shutil.copytree(parts, "runs/whole")
    for path in complete_checkpoints(parts)[2:]:
        path.rename(path.with_name(f".{path.name}.partial"))
    fit_on(2, tiny_recipe, "parts", *options)
    assert_same_end(Path(whole), parts)
    for step, row in metrics(Path(whole)).items():
        assert row["train_loss"] == metrics(parts)[step]["train_loss"]


@pytest.mark.distributed
def test_two_ranks_stop_in_the_middle_of_a_validation(tiny_recipe):
    """Lightning starts them here. Most of the time goes into validations."""
    options = ("--trainer.log_every_n_steps", "1", "--batch.micro", "1")
    options += ("--validation.every_steps", "1", "--validation.tokens", "1000")
    options += ("--checkpoint.every_steps", "2", "--model.budget.steps", "3")
    whole = fit_on(2, tiny_recipe, "whole", *options)
    two = ("--trainer.devices", "2", "--run.name", "stopped")
    command = ("fit", "--config", str(tiny_recipe), *options, *two)
    with Bov(*command, fork_children=True) as process:
        wait_for(lambda: Path("runs/stopped/metrics.csv").exists(), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143, process.err
    stopped = fit_on(2, tiny_recipe, "stopped", *options)
    assert_same_end(whole, stopped)
    for step, row in metrics(whole).items():
        assert row["val_bpb"] == metrics(stopped)[step]["val_bpb"]


@pytest.mark.distributed
def test_a_rank_that_hangs_is_named(tiny_recipe):
    """The second process is stopped as a hanging file system would stop it."""
    options = ("--model.budget.steps", "100000", "--guard.late_after_s", "2")
    with BovOnRanks(2, "fit", "--config", str(tiny_recipe), *options) as run:
        first, second = run.ranks
        wait_for(lambda: complete_checkpoints(Path("runs/tiny")), run)
        os.kill(second.pid, signal.SIGSTOP)
        wait_for(lambda: "rank 1" in first.err, run)
        assert "no progress for 2 s" in first.err
        assert "rank 1 does not answer" in first.err
        os.kill(second.pid, signal.SIGCONT)
        first.send_signal(signal.SIGTERM)
        assert run.wait(120) == [143, 143]


def wait_for(condition, process: Bov | BovOnRanks) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.distributed
def test_compiled_blocks_train_sharded_as_they_do_alone(tiny_recipe):
    """Compiled kernels round otherwise, and nothing else."""
    steps = ("--trainer.log_every_n_steps", "1", "--model.optimizer.muon_dtype", "float32")
    steps += ("--batch.micro", "4")
    # Every kind of layer once, training and validation: a C++ compiler needs a second per kernel.
    steps += ("--model.config.n_layer", "2", "--validation.every_steps", "8")
    expected = metrics(fit(tiny_recipe, *steps, "--run.name", "plain"))
    found = metrics(fit_on(2, tiny_recipe, "fsdp", *steps, "--compile", "true"))
    for step, row in expected.items():
        loss = float(row["train_loss"])
        assert float(found[step]["train_loss"]) == pytest.approx(loss, abs=1e-4), step


@pytest.mark.distributed
def test_torchrun_starts_the_ranks(tiny_recipe):
    """Interpreters of their own, as outside of tests."""
    plain = fit_on(2, tiny_recipe, "plain")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "bov_lightning.cli", "fit"]
    command += ["--config", str(tiny_recipe), "--run.name", "torchrun"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert_same_end(plain, Path("runs/torchrun"))


@pytest.mark.distributed
def test_bf16_parameters_and_hsdp_train(tiny_recipe):
    """Four ranks, two copies; gradients are summed in fp32 and weights kept so."""
    hsdp = "{class_path: bov_lightning.ShardedStrategy, init_args: {replicate: 2}}"
    options = ("--batch.micro", "2", "--trainer.precision", "bf16-mixed")
    run = fit_on(4, tiny_recipe, "hsdp", *options, "--trainer.strategy", hsdp)
    weights = read_whole(complete_checkpoints(run)[-1] / WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    plain = fit(tiny_recipe, "--run.name", "plain")
    found, expected = (float(metrics(path)[8]["val_bpb"]) for path in (run, plain))
    assert found == pytest.approx(expected, abs=0.05)
