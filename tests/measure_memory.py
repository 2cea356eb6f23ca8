"""The bytes that training takes on a rank: for planning/test_memory.py.

What is measured is the resident memory of the process at its highest (VmHWM), less what it was
before the model was made. A tiny model has been trained by then, so that all libraries are loaded.
"""

import ctypes
from contextlib import nullcontext
from pathlib import Path

import torch

from bov_lightning.distributed.host_tables import keep_tables_on_host
from bov_lightning.distributed.layout import Layout, read_layout
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.distributed.sharding import (
    gathered_once,
    make_mesh,
    recompute_activations,
    shard,
    write_part,
)
from bov_lightning.model.layers import Initialiser
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW
from bov_lightning.recipe.budget import accumulation
from bov_lightning.recipe.building import build
from bov_lightning.recipe.overlays import merge
from bov_lightning.recipe.sections import Recipe

N_STEP = 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Of mallopt, in malloc.h."""


def resident(key: str) -> int:
    """VmRSS, or VmHWM: the most since `forget_highest`; bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def forget_highest() -> None:
    """Lets VmHWM start from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def train(recipe: Recipe, layout: Layout) -> None:
    """A few steps as `bov fit` takes them, on random tokens."""
    config, batch = recipe.model.config, recipe.batch
    n_micro = accumulation(batch.tokens, batch.micro, config.sequence_len, layout.world_size)
    dtype = torch.bfloat16 if layout.half else None
    with torch.device("meta"):
        model = Transformer(config)
    tables = None
    if recipe.tables_on == "host":
        group = torch.distributed.group.WORLD if layout.world_size > 1 else None
        tables = keep_tables_on_host(model, Ranks(group), dtype)
    if recipe.activation_checkpointing:
        recompute_activations(model)
    if layout.sharded and (layout.world_size > 1 or layout.half):
        shard(model, make_mesh("cpu", layout.world_size, layout.replicate), dtype)
    model.to_empty(device="cpu")
    model.initialise(Initialiser(0, write_part))
    network = model if layout.sharded else torch.nn.parallel.DistributedDataParallel(model)
    groups = build_groups(model, recipe.model.optimizer, config, batch.tokens)
    optimizer = MuonAdamW(groups, tables)
    for _ in range(N_STEP):
        for micro_step in range(n_micro):
            rows = torch.randint(config.vocab_size, (batch.micro, config.sequence_len + 1))
            is_last = micro_step == n_micro - 1
            with nullcontext() if is_last else gathered_once(model, layout.world_size):
                with torch.autocast("cpu", dtype, enabled=layout.half and not layout.sharded):
                    loss = network(rows[:, :-1], rows[:, 1:])
                if micro_step == 0:
                    optimizer.zero_grad()
                loss.backward()
        optimizer.step()


def give_memory_back() -> None:
    """Freed memory goes back at once, so that resident memory is living memory."""
    libc = ctypes.CDLL(None)
    for parameter, value in (
        (M_TRIM_THRESHOLD, 2**18),
        (M_MMAP_THRESHOLD, 2**18),
        (M_ARENA_MAX, 1),
    ):
        assert libc.mallopt(parameter, value) == 1


def peak(rank: int, world: int, settings: dict) -> int:
    """Bytes that ``settings``, a recipe, takes on this rank."""
    give_memory_back()
    shape = {"d_model": 64, "vocab_size": 128, "sequence_len": 16}
    tiny = merge(settings, {"model": {"config": shape}, "batch": {"tokens": 64, "micro": 1}})
    for part in (tiny, settings):
        recipe = build(Recipe, part, "test")
        before = resident("VmRSS")
        forget_highest()
        train(recipe, read_layout(recipe.trainer, world))
    return resident("VmHWM") - before
