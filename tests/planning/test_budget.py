"""Figures before training: those of the paper to the digit, and errors that advise."""

import pytest
from parity import NAMES, read_rows
from variants import mostly_slow

from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.counting import scaling_parameters
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.groups import scaled
from bov_lightning.planning.cost import make_plan
from bov_lightning.recipe.budget import accumulation, horizon
from bov_lightning.recipe.sections import BudgetConfig

SIZES = {
    "135m": ({"n_layer": 12, "n_head": 6, "n_kv_head": 6, "d_model": 768}, 1.5e18, 2**19),
    "780m": ({"n_layer": 24, "n_head": 12, "n_kv_head": 12, "d_model": 1536}, 3.91e19, 2**20),
}


@pytest.mark.parametrize("name", mostly_slow(NAMES, {"standard", "bov", "value_embedding_gated"}))
def test_plan_equals_the_paper_to_the_digit(name, shared):
    reference = read_rows(shared)
    for size, (shape, flops, batch) in SIZES.items():
        value = ValueConfig(**reference["rows"][name]["value"])
        config = TransformerConfig(**shape, vocab_size=32768, value=value)
        plan = make_plan(config, BudgetConfig(flops=flops), batch)
        expected = reference["full_size"][size][name]
        assert plan["flops_per_token"] == expected["flops_per_token"], name
        assert plan["iterations"] == expected["iterations"], name
        assert plan["tokens"] == expected["tokens"], name
        assert plan["params"]["live"] == expected["live_params"], name
        assert plan["params"]["tables"] == expected["table_params"], name
        standard = reference["full_size"][size]["standard"]["live_params"]
        assert plan["params"]["baseline"] == standard, name


def test_learning_rates_and_weight_decay_scale_as_in_the_paper():
    def rates(size):
        shape, _, batch = SIZES[size]
        config = TransformerConfig(**shape, vocab_size=32768, value=ValueConfig("bank"))
        return scaled(OptimizerConfig(scale_to_model=True), config, batch)

    reference = OptimizerConfig()
    for name, value in rates("135m").items():
        assert value == pytest.approx(getattr(reference, name)), name
    large = rates("780m")
    assert large["matrix_lr"] == pytest.approx(0.0283, rel=1e-2)
    assert large["scalar_lr"] == pytest.approx(0.707, rel=1e-2)
    assert large["weight_decay"] == pytest.approx(0.0597, rel=1e-2)
    assert large["embedding_lr"] == pytest.approx(0.3)
    assert large["smear_lr"] == 0.2


def test_horizon_of_every_kind_of_budget():
    config = TransformerConfig(n_layer=2, d_model=48, n_head=2, n_kv_head=2, vocab_size=64)
    model = Transformer(config)
    flops = model.flops_per_token()
    assert horizon(BudgetConfig(steps=7), config, 100) == 7
    assert horizon(BudgetConfig(tokens=1e4), config, 100) == 100
    assert horizon(BudgetConfig(flops=flops * 1260), config, 100) == 13
    scaling = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    scaling -= model.embedding.weight.numel() + model.smear.gate.numel()
    assert scaling_parameters(config) == scaling
    assert horizon(BudgetConfig(tokens_per_param=20), config, 100) == round(20 * scaling / 100)
    assert horizon(BudgetConfig(tokens=1), config, 100) == 1


@pytest.mark.parametrize("given", [{}, {"flops": 1e9, "steps": 3}, {"steps": 0}, {"tokens": -1}])
def test_budget_is_exactly_one_positive_number(given):
    with pytest.raises(UserError, match="budget"):
        BudgetConfig(**given)


def test_indivisible_batch_names_the_nearest_that_are():
    assert accumulation(4096, 4, 256, 2) == 2
    with pytest.raises(UserError, match="4096 and 6144"):
        accumulation(5000, 4, 256, 2)
    with pytest.raises(UserError, match="that are: 2048"):
        accumulation(100, 4, 256, 2)
