"""Wider and narrower MLPs, and the control that is as large as a bank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import OVERLAYS, make_model, perturb, token_ids

from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.counting import count_parameters, flops_per_token, meta_model
from bov_lightning.model.prefill import prefill
from bov_lightning.planning.cost import make_plan
from bov_lightning.recipe.given import read
from bov_lightning.recipe.sections import BudgetConfig

BANK = ValueConfig(**OVERLAYS["bov"])


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    n_layer=st.integers(3, 14), n_kv_head=st.sampled_from([1, 2, 4]),
    d_model=st.sampled_from([24, 48, 64, 128, 192]), vocab_size=st.integers(130, 9000),
)  # fmt: skip
def test_the_control_has_as_many_parameters_as_the_bank(n_layer, n_kv_head, d_model, vocab_size):
    shape = {"n_layer": n_layer, "n_head": 4, "n_kv_head": n_kv_head, "d_model": d_model,
             "vocab_size": vocab_size}  # fmt: skip
    if d_model // 4 % 2:
        return
    bank = count_parameters(TransformerConfig(**shape, value=BANK)).live
    config = TransformerConfig(**shape, d_mlp="like_bank")
    assert config.mlp_width % 16 == 0
    # A width of 16 is 2 * 16 * d_model parameters per layer; a coefficient per bank is one more.
    rounding = 16 * d_model * n_layer + len(TransformerConfig(**shape, value=BANK).target_layers)
    assert abs(count_parameters(config).live - bank) <= rounding


@pytest.mark.parametrize("d_mlp", [1, 40, 4 * 48, 500, "like_bank"])
def test_flops_and_parameters_follow_the_matrices(d_mlp):
    shape = {"n_layer": 6, "n_head": 4, "n_kv_head": 2, "d_model": 48, "vocab_size": 900}
    plain, other = TransformerConfig(**shape), TransformerConfig(**shape, d_mlp=d_mlp)
    added = 6 * 2 * 48 * (other.mlp_width - 4 * 48)
    assert flops_per_token(other) - flops_per_token(plain) == 6 * added
    assert count_parameters(other).live - count_parameters(plain).live == added
    sizes = {block.mlp.input.weight.shape for block in meta_model(other).blocks}
    assert sizes == {(other.mlp_width, 48)}


def test_equal_flops_are_fewer_steps():
    shape = {"n_layer": 6, "n_head": 2, "n_kv_head": 2, "d_model": 128, "vocab_size": 4096}
    plans = [
        make_plan(TransformerConfig(**shape, **more), BudgetConfig(flops=1e13), 4096)
        for more in ({}, {"d_mlp": "like_bank"})
    ]
    assert plans[1]["iterations"] < plans[0]["iterations"]
    assert plans[1]["flops"] == pytest.approx(plans[0]["flops"], rel=0.02)


@torch.no_grad()
def test_four_times_the_width_is_what_null_means():
    plain, spelled = (make_model(OVERLAYS["bov"], **more) for more in ({}, {"d_mlp": 4 * 48}))
    for (name, ours), (_, theirs) in zip(
        plain.named_parameters(), spelled.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@torch.no_grad()
@pytest.mark.parametrize("d_mlp", [20, "like_bank"])
def test_cached_equals_whole(d_mlp):
    model = perturb(make_model(OVERLAYS["standard"], d_mlp=d_mlp), smear=0.9)
    ids = token_ids(60)
    cache = model.new_cache(len(ids), 60)
    expected = model(ids)
    first = prefill(model, cache, ids[:, :40])
    torch.testing.assert_close(first, expected[:, 39], atol=1e-5, rtol=0)
    for i in range(40, 60):
        found = model(ids[:, i : i + 1], cache=cache)[:, 0]
        torch.testing.assert_close(found, expected[:, i], atol=1e-5, rtol=0)


def test_a_bank_has_no_control_of_its_own():
    with pytest.raises(UserError, match="control of a bank.*not bank"):
        TransformerConfig(d_mlp="like_bank", value=BANK, vocab_size=100)
    with pytest.raises(UserError, match="d_mlp is 0: from 1"):
        TransformerConfig(d_mlp=0, vocab_size=100)
    with pytest.raises(UserError, match="d_mlp"):
        read(["quickstart"], ["--model.config.d_mlp", "like_banks"])


def test_the_overlay_makes_the_control():
    recipe = read(["nano", "values/wide"]).recipe
    assert recipe.model.config.mlp_width > 4 * recipe.model.config.d_model
    assert read(["nano", "values/wide"]).recipe.run.name == "nano-wide"


def test_shapes_may_be_given_by_position():
    """As benchmarks and scripts do: later keys come behind those that were there."""
    shape = TransformerConfig(6, 4, 2, 128, 4096, 256, "L")
    found = (shape.vocab_size, shape.sequence_len, shape.window_pattern, shape.d_mlp)
    assert found == (4096, 256, "L", None)
