"""Value tables in the host's memory on several ranks, each of which holds a part of the rows."""

import shutil
from pathlib import Path

import pytest
import torch
from distributed.test_distributed import fit_on, run_in, write
from optim.test_row_adamw import N_STEP, NGRAMS, VALUES, all_rows, config_of
from optim.test_sharded import whole
from processes import in_processes
from runs import assert_same_end, die_after, metrics

from bov_lightning.checkpoint.directory import OPTIMIZER, WEIGHTS, complete_checkpoints
from bov_lightning.checkpoint.reading import read_whole
from bov_lightning.checkpoint.resuming import restore
from bov_lightning.distributed.host_tables import keep_tables_on_host
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.distributed.sharding import local_part, make_mesh, shard, write_part
from bov_lightning.model.config import ValueConfig
from bov_lightning.model.layers import Initialiser
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW


def objects(world: int, value: ValueConfig, on_host: bool) -> tuple[Transformer, MuonAdamW]:
    """A model and its optimizer, sharded by FSDP2 if there are several processes."""
    config, tables = config_of(value), None
    with torch.device("meta"):
        model = Transformer(config)
    if on_host:
        tables = keep_tables_on_host(model, ranks_of(world))
    if world > 1:
        shard(model, make_mesh("cpu", world, 1), None)
    model.to_empty(device="cpu")
    model.initialise(Initialiser(0, write_part))
    groups = build_groups(model, OptimizerConfig(muon_dtype="float32"), config, 0)
    return model, MuonAdamW(groups, tables)


def ranks_of(world: int) -> Ranks:
    return Ranks(torch.distributed.new_group(backend="gloo") if world > 1 else None)


def train(rank: int, world: int, model: Transformer, optimizer: MuonAdamW) -> None:
    """Steps of two micro-steps, of which each rank has its own texts."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(N_STEP):
        for i in range(2):
            rows = all_rows(generator, 6)[rank::world]
            if world > 1:
                model.set_requires_gradient_sync(i == 1)
            (model(rows[:, :-1], rows[:, 1:]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def compare_with_tables_on_the_device(rank: int, world: int) -> None:
    for value in (VALUES["bank"], VALUES["ngram_bank"]):
        (plain, dense), (model, optimizer) = (objects(world, value, on) for on in (False, True))
        for pair in ((plain, dense), (model, optimizer)):
            train(rank, world, *pair)
        expected, n_table = dict(plain.named_parameters()), 0
        for name, parameter in model.named_parameters():
            state = optimizer.state[parameter]
            n_table += "row_updates" in state
            theirs = dense.state[expected[name]]
            pairs = [(parameter, expected[name]), *((state[kind], theirs[kind]) for kind in theirs)]
            for own, their in pairs:
                assert local_part(own).shape == local_part(their).shape
                assert torch.equal(local_part(own), local_part(their)), name
        assert n_table == 2
        assert optimizer.gradient_norm == pytest.approx(dense.gradient_norm, rel=1e-6)
    _decode(rank, plain, model)
    _skip(rank, model, optimizer)


@torch.no_grad()
def _decode(rank: int, plain: Transformer, model: Transformer) -> None:
    """Cached: each rank needs other rows, and a single one no new row at all."""
    both = [(x, x.new_cache(1, 16)) for x in (plain, model)]
    for ids in ([[1 + rank, 5, 9]], [[9 if rank else 60]], [[1 + rank, 7]]):
        found = [x(torch.tensor(ids), cache=cache) for x, cache in both]
        torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def _skip(rank: int, model: Transformer, optimizer: MuonAdamW) -> None:
    """What is not finite in a table's gradient on one rank is skipped by all."""
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    rows = torch.arange(8)[None] + 8 * rank
    model(rows[:, :-1], rows[:, 1:]).backward()
    if rank == 1:
        optimizer.rows.tables.tables[0].received[0] = torch.nan
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.n_skipped == 1
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), before[name]), name


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_train_the_bits_of_tables_that_fsdp_shards(world):
    """Three ranks have a part of another size, and sums whose order is FSDP2's only by chance."""
    if world == 2:
        in_processes(2, compare_with_tables_on_the_device)
    else:
        in_processes(3, compare_with_one_process)


def compare_with_one_process(rank: int, world: int) -> None:
    value = VALUES["ngram_bank"]
    model, optimizer = objects(world, value, on_host=True)
    start = {name: whole(p).clone() for name, p in model.named_parameters()}
    train(rank, world, model, optimizer)
    expected, alone = objects(1, value, on_host=True)
    train(0, 1, expected, alone)
    found = {name: whole(p) for name, p in model.named_parameters()}
    for name, weight in expected.named_parameters():
        update, error = weight - start[name], found[name] - weight
        assert error.norm() < 0.01 * update.norm() + 1e-6, name


def write_trained(rank: int, world: int, run: Path, on_host: bool) -> None:
    model, optimizer = objects(world, VALUES["ngram_bank"], on_host)
    train(rank, world, model, optimizer)
    write(ranks_of(world), run, model, optimizer, N_STEP)


def copy(rank: int, world: int, run: Path, target: Path, on_host: bool) -> None:
    """Reads a checkpoint, and writes what was read."""
    model, optimizer = objects(world, VALUES["ngram_bank"], on_host)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    ranks = ranks_of(world)
    restore(run, model, optimizer, ranks, torch.device("cpu"))
    write(ranks, target, model, optimizer, N_STEP)


def content(run: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = complete_checkpoints(run)
    both = read_whole(checkpoint / WEIGHTS) | read_whole(checkpoint / OPTIMIZER)
    return {name: x for name, x in both.items() if not name.startswith("random.")}


@pytest.mark.distributed
def test_checkpoints_go_from_ranks_to_ranks_and_from_host_to_device(tmp_path):
    """One rank, two, one; then with tables on the device, and back. Every row is touched in every
    step, so that counts of before a stay on the device are those that are made up after it."""
    run_in(1, write_trained, tmp_path / "0", True)
    expected = content(tmp_path / "0")
    counts = {name for name in expected if name.endswith(".row_updates")}
    assert len(counts) == 2
    for i, (world, on_host) in enumerate([(2, True), (1, True), (2, False), (1, False), (2, True)]):
        run_in(world, copy, tmp_path / f"{i}", tmp_path / f"{i + 1}", on_host)
        found = content(tmp_path / f"{i + 1}")
        assert found.keys() == (expected.keys() if on_host else expected.keys() - counts)
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name


HOST = ("--tables_on", "host", "--trainer.log_every_n_steps", "1", "--batch.micro", "2",
        "--model.optimizer.muon_dtype", "float32",
        "--model.config.value.source", "ngram_bank",
        "--model.config.value.source_args", str(NGRAMS))  # fmt: skip


@pytest.mark.distributed
def test_runs_of_two_ranks(tiny_recipe):
    """FSDP2 and DDP, with validations in between; killed, and resumed."""
    expected = metrics(fit_on(2, tiny_recipe, "ddp", *HOST, "--trainer.strategy", "ddp"))
    run = fit_on(2, tiny_recipe, "fsdp", *HOST)
    for step, row in metrics(run).items():
        loss = float(expected[step]["train_loss"])
        assert float(row["train_loss"]) == pytest.approx(loss, abs=1e-5), step
    undisturbed = Path(shutil.copytree(run, "runs/undisturbed"))
    die_after(run, 4)
    fit_on(2, tiny_recipe, "fsdp", *HOST)
    assert_same_end(undisturbed, run)
