"""Sharded training steps equal whole ones: FSDP2, HSDP, and the optimizer on their DTensors."""

from pathlib import Path

import pytest
import torch
from processes import in_processes
from torch.distributed.tensor.debug import CommDebugMode

from bov_lightning.distributed.strategy import make_mesh, shard, write_part
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.layers import Initialiser
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW

N_STEP = 4
LR = 1e-3

# d_model 36 over 3 ranks is even, a padded vocabulary of 64 rows is not.
SIZES = {"n_layer": 6, "n_head": 3, "n_kv_head": 3, "d_model": 36, "vocab_size": 60,
         "sequence_len": 32}  # fmt: skip
BANK = TransformerConfig(**SIZES, value=ValueConfig("bank", "last_third", "learned"))
SHARED = TransformerConfig(
    **SIZES, value=ValueConfig("bank", "second_half", "learned", shared=True)
)


def make(config: TransformerConfig, world: int = 1, replicate: int = 1) -> Transformer:
    """A model, sharded on the meta device first if there are several processes."""
    if world == 1:
        return Transformer(config)
    with torch.device("meta"):
        model = Transformer(config)
    shard(model, make_mesh("cpu", world, replicate), None)
    model.to_empty(device="cpu")
    model.initialise(Initialiser(0, write_part))
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "full_tensor", lambda: tensor)().detach()


def train(config, rank: int, world: int, replicate: int) -> dict[str, torch.Tensor]:
    """Weights after a few small steps on the rank's part of each batch."""
    model = make(config, world, replicate)
    start = {f"start.{name}": whole(p).clone() for name, p in model.named_parameters()}
    # fp32 instead of bf16, whose rounding would hide mistakes.
    rates = OptimizerConfig(*[LR] * 6, muon_dtype="float32")
    optimizer = MuonAdamW(build_groups(model, rates, config, 0))
    generator = torch.Generator().manual_seed(0)
    for _ in range(N_STEP):
        rows = torch.randint(0, 60, (12, 33), generator=generator)[rank::world]
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    norm = torch.tensor(optimizer.gradient_norm)
    return start | {name: whole(p) for name, p in model.named_parameters()} | {"norm": norm}


def train_and_save(rank: int, world: int, config, replicate: int, folder: Path) -> None:
    weights = train(config, rank, world, replicate)
    if rank == 0:
        torch.save(weights, folder / "weights.pt")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "world", "replicate"),
    [(BANK, 2, 1), (BANK, 3, 1), (SHARED, 2, 1), (BANK, 4, 2)],
    ids=["two", "three", "shared-table", "hsdp"],
)
def test_sharded_steps_equal_whole_ones(config, world, replicate, tmp_path):
    in_processes(world, train_and_save, config, replicate, tmp_path)
    check_same_training(config, tmp_path)


def check_same_training(config, folder: Path) -> None:
    """What `train_and_save` left in ``folder`` is what one process trains."""
    found = torch.load(folder / "weights.pt", weights_only=True)
    expected = train(config, 0, 1, 1)
    assert found["norm"] == pytest.approx(expected.pop("norm").item(), rel=1e-5)
    for name, weight in expected.items():
        if name.startswith("start."):
            assert torch.equal(found[name], weight), name
        else:
            update, error = weight - expected[f"start.{name}"], found[name] - weight
            assert error.norm() < 0.01 * update.norm() + 1e-6, name


def count_collectives(rank: int, world: int, folder: Path) -> None:
    model = make(BANK, world)
    optimizer = MuonAdamW(build_groups(model, OptimizerConfig(), BANK, 0))
    rows = torch.randint(0, 60, (4, 33))
    for _ in range(2):
        model(rows[:, :-1], rows[:, 1:]).backward()
        with CommDebugMode() as counted:
            optimizer.step()
    if rank == 0:
        calls = {str(kind): n for kind, n in counted.get_comm_counts().items()}
        torch.save(calls, folder / "calls.pt")


@pytest.mark.distributed
def test_a_step_makes_about_a_dozen_collectives(tmp_path):
    """Two redistributions and one sum for each shape of matrices, and one sum for the norm.

    It does not grow with the number of layers.
    """
    in_processes(2, count_collectives, tmp_path)
    calls = torch.load(tmp_path / "calls.pt", weights_only=True)
    n_shape = 3
    assert 0 < sum(calls.values()) <= 3 * n_shape + 1, calls


def skip(rank: int, world: int, folder: Path) -> None:
    model = make(BANK, world)
    optimizer = MuonAdamW(build_groups(model, OptimizerConfig(), BANK, 0))
    rows = torch.randint(0, 60, (4, 33), generator=torch.Generator().manual_seed(rank))

    def step(poisoned: bool) -> dict[str, torch.Tensor]:
        model(rows[:, :-1], rows[:, 1:]).backward()
        if poisoned and rank == 1:
            model.blocks[0].mlp.input.weight.grad.to_local()[0, 0] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
        return {name: whole(p).clone() for name, p in model.named_parameters()}

    before, after, later = step(False), step(True), step(False)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in before)
    assert (optimizer.n_skipped, optimizer.n_skipped_in_row) == (1, 0)


@pytest.mark.distributed
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path):
    in_processes(2, skip, tmp_path)
