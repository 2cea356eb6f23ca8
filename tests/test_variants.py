"""What every value variant does besides computing logits: FLOPs, training, resuming, sharing."""

import shutil
from pathlib import Path

import pytest
import torch
from optim.test_sharded import SIZES, check_same_training, train_and_save
from processes import in_processes
from runs import assert_same_end, die_after, fit
from torch.utils.flop_counter import FlopCounterMode
from variants import (
    KINDS,
    OUTSIDE,
    OVERLAYS,
    PATHS,
    make_model,
    mostly_slow,
    perturb,
    token_ids,
)

import bov_lightning
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW
from bov_lightning.planning.cost import make_plan
from bov_lightning.recipe.sections import BudgetConfig

FAST = {"bov", "value_embedding_gated", "context_plus_first_layer"}
PARAMETERS = [
    "standard", "bov", "bov_shared_table", "value_embedding_gated", "ngram_bank", *OUTSIDE,
]  # fmt: skip
"""Variants that together have every kind of parameters."""


@pytest.mark.parametrize("name", mostly_slow(OVERLAYS, KINDS))
@torch.no_grad()
def test_flops_are_those_of_the_products_that_run(name):
    """6 per matrix parameter is 2 in the forward pass; the smear's 24 channels do not count."""
    model = make_model(OVERLAYS[name], vocab_size=128, sequence_len=128, window_pattern="L")
    with FlopCounterMode(display=False) as counted:
        model(token_ids(128, n_row=1))
    counts = counted.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "mm" in str(op))
    smear = 2 * 24 * 128
    attention = 12 * 48 * 128 * 6
    assert (products - smear) * 3 == 128 * (model.flops_per_token() - attention)


@pytest.mark.parametrize("name", mostly_slow(OVERLAYS, KINDS))
def test_one_optimizer_step_trains_every_parameter(name):
    """Each receives a gradient: there is no W_V that nothing reads."""
    model = perturb(make_model(OVERLAYS[name]), smear=0.5)
    groups = build_groups(model, OptimizerConfig(), model.config, 0)
    trained = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters()}
    assert len(trained) == len(list(model.parameters()))
    assert all(p.ndim == 2 for group in groups if group["kind"] == "muon" for p in group["params"])
    optimizer = MuonAdamW(groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = token_ids(65)
    model(ids[:, :-1], ids[:, 1:]).backward()
    for parameter, p in model.named_parameters():
        assert p.grad is not None, parameter
        assert p.grad.abs().max() > 0, parameter
    optimizer.step()
    for parameter, p in model.named_parameters():
        assert not torch.equal(p, before[parameter]), parameter


@pytest.mark.parametrize("name", mostly_slow(OVERLAYS, FAST))
def test_planned_parameters_and_caches_are_the_real_ones(name):
    model = make_model(OVERLAYS[name], window_pattern="L")
    plan = make_plan(model.config, BudgetConfig(steps=1), 1)
    assert plan["params"]["live"] == sum(p.numel() for p in model.parameters())
    kept = sum(model.new_cache(1, 1000, dtype=torch.bfloat16).nbytes_per_layer)
    shared = OVERLAYS[name]["source"] == "first_layer" and not OVERLAYS[name]["add_context"]
    if not shared:  # the first layer's values serve its readers, but are there once more
        assert plan["cache"]["bytes_per_token"] * 1000 == kept


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_resumed_run_ends_as_an_undisturbed_one(name, tiny_recipe):
    overlay = ("--config", str(PATHS[name]))
    parts = fit(tiny_recipe, *overlay)
    whole = shutil.copytree(parts, "whole")
    die_after(parts, 4)
    fit(tiny_recipe, *overlay)
    assert_same_end(Path(whole), parts)
    model, _ = bov_lightning.load(parts)
    ids, cache = token_ids(20, vocab_size=300), model.new_cache(2, 20)
    with torch.inference_mode():
        pieces = [model(piece, cache=cache) for piece in ids.split((12, 1, 7), dim=1)]
        assert torch.allclose(torch.cat(pieces, dim=1), model(ids), atol=1e-4)


SHARDED = [*PARAMETERS, "bov_per_channel", "value_embedding_gated_row", "context_plus_first_layer"]
"""Besides, coefficients that are rows, gates that read a row, values of another layer."""


def train_all(rank: int, world: int, folder: Path) -> None:
    for name in SHARDED:
        config = TransformerConfig(**SIZES, value=ValueConfig(**OVERLAYS[name]))
        train_and_save(rank, world, config, 1, folder / name)


@pytest.mark.distributed
def test_two_ranks_train_all_kinds_of_parameters_as_one_does(tmp_path):
    """FSDP2 over gloo; starting the ranks takes longer than training, so they do them all."""
    for name in SHARDED:
        (tmp_path / name).mkdir()
    in_processes(2, train_all, tmp_path)
    for name in SHARDED:
        config = TransformerConfig(**SIZES, value=ValueConfig(**OVERLAYS[name]))
        check_same_training(config, tmp_path / name)
