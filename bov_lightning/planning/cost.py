"""What a training run costs: parameters, FLOPs, steps, KV cache; before anything runs."""

from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.counting import (
    break_even_tokens,
    count_parameters,
    flops_per_token,
    saved_cache_bytes,
)
from bov_lightning.recipe.budget import horizon
from bov_lightning.recipe.sections import BudgetConfig


def make_plan(config: TransformerConfig, budget: BudgetConfig, batch_tokens: int) -> dict:
    """What a run costs on whatever devices; sizes in bytes."""
    steps = horizon(budget, config, batch_tokens)
    kv_standard = 2 * 2 * config.d_value * config.n_layer
    return {
        "flops_per_token": flops_per_token(config),
        "iterations": steps,
        "tokens": steps * batch_tokens,
        "flops": float(flops_per_token(config) * steps * batch_tokens),
        "params": vars(count_parameters(config)),
        "cache": {
            "bytes_per_token": kv_standard - saved_cache_bytes(config),
            "bytes_per_token_standard": kv_standard,
            "break_even_tokens": break_even_tokens(config),
        },
    }
