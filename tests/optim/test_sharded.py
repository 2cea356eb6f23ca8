"""The optimizer on FSDP2's DTensors equals the optimizer on whole tensors."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim import muon_adamw
from bov_lightning.optim.groups import OptimizerConfig, build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW

N_STEP = 4


# d_model 36 over 3 ranks is even, a padded vocabulary of 64 rows is not.
CONFIG = TransformerConfig(
    n_layer=3, n_head=3, n_kv_head=3, d_model=36, vocab_size=60, sequence_len=32,
    value=ValueConfig("bank", "last_third", "learned"),
)  # fmt: skip
LR = 1e-3


def train(sharded: bool, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Weights after a few small steps on the rank's part of each batch."""
    # fp32 instead of bf16, whose rounding would hide mistakes.
    muon_adamw.ITERATION_DTYPE = torch.float32
    model = Transformer(CONFIG)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    rates = OptimizerConfig(*[LR] * 6)
    optimizer = MuonAdamW(build_groups(model, rates, CONFIG, 0))
    generator = torch.Generator().manual_seed(0)
    for _ in range(N_STEP):
        rows = torch.randint(0, 60, (6, 33), generator=generator)[rank::world]
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: (p.full_tensor() if sharded else p).detach() for name, p in model.named_parameters()
    }


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    weights = train(True, rank, world)
    if rank == 0:
        torch.save(weights, f"{folder}/weights.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_sharded_steps_equal_whole_ones(world, tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (world, port, str(tmp_path)), nprocs=world)
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    monkeypatch.setattr(muon_adamw, "ITERATION_DTYPE", torch.float32)
    expected = train(False, 0, 1)
    start = dict(Transformer(CONFIG).named_parameters())
    for name, weight in expected.items():
        update, error = weight - start[name], found[name] - weight
        assert error.norm() < 0.01 * update.norm() + 1e-6, name
