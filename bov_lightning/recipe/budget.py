"""What a training run costs: parameters, FLOPs, horizon, KV cache; before anything runs."""

from dataclasses import dataclass, replace

import torch

from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.transformer import Transformer

REFERENCE_LAYERS = 12
REFERENCE_D_MODEL = 768
REFERENCE_BATCH_TOKENS = 2**19

PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOPs per second by a part of the device's name, from the vendor's data sheets."""


@dataclass(frozen=True)
class BudgetConfig:
    """How long to train. Exactly one of the four."""

    flops: float | None = None
    """Training FLOPs of the whole run."""

    tokens: float | None = None
    """Training tokens of the whole run."""

    tokens_per_param: float | None = None
    """Training tokens per scaling parameter (block matrices and head, with standard values)."""

    steps: int | None = None
    """Optimizer steps."""

    def __post_init__(self):
        given = [name for name in vars(self) if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise UserError(
                f"model.budget needs exactly one of flops, tokens, tokens_per_param and steps, "
                f"not {found}"
            )
        if getattr(self, given[0]) <= 0:
            raise UserError(f"model.budget.{given[0]} is {getattr(self, given[0])}: above 0")


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters."""

    live: int
    """Everything that is stored and trained."""
    tables: int
    """Value tables."""
    baseline: int
    """Live parameters of the same shape with standard values."""


def meta_model(config: TransformerConfig) -> Transformer:
    """The model without memory, for counting."""
    with torch.device("meta"):
        return Transformer(config)


def with_standard_values(config: TransformerConfig) -> TransformerConfig:
    """The same shape with x W_V in every layer."""
    return replace(config, value=ValueConfig())


def count_parameters(config: TransformerConfig) -> ParameterCounts:
    """Live, table and baseline parameters; padded vocabulary rows count."""
    model = meta_model(config)
    return ParameterCounts(
        live=sum(p.numel() for p in model.parameters()),
        tables=sum(p.numel() for p in model.grouped_parameters().get("table", [])),
        baseline=sum(p.numel() for p in meta_model(with_standard_values(config)).parameters()),
    )


def flops_per_token(config: TransformerConfig) -> int:
    """Training FLOPs per token, forward and backward; see `Transformer.flops_per_token`."""
    return meta_model(config).flops_per_token()


def scaling_parameters(config: TransformerConfig, reference: bool = False) -> int:
    """Parameters of block matrices and head with standard values, the size that rules scale by.

    ``reference``: of the 12-layer, d_model 768 model with the same vocabulary instead.
    """
    if reference:
        return (
            12 * REFERENCE_LAYERS * REFERENCE_D_MODEL**2
            + config.padded_vocab_size * REFERENCE_D_MODEL
        )
    model = meta_model(with_standard_values(config))
    groups = model.grouped_parameters()
    return sum(p.numel() for name in ("matrix", "head") for p in groups[name])


def horizon(budget: BudgetConfig, config: TransformerConfig, batch_tokens: int) -> int:
    """Optimizer steps that the budget pays for, rounded to the nearest; at least 1."""
    if budget.steps is not None:
        return budget.steps
    if budget.flops is not None:
        tokens = budget.flops / flops_per_token(config)
    elif budget.tokens is not None:
        tokens = budget.tokens
    else:
        tokens = budget.tokens_per_param * scaling_parameters(config)
    return max(1, round(tokens / batch_tokens))


def accumulation(batch_tokens: int, micro: int, sequence_len: int, world_size: int) -> int:
    """Micro-steps per optimizer step; a batch that cannot be divided is a `UserError`."""
    chunk = micro * sequence_len * world_size
    if batch_tokens % chunk == 0 and batch_tokens > 0:
        return batch_tokens // chunk
    below = batch_tokens // chunk * chunk
    nearest = [str(n) for n in (below, below + chunk) if n > 0]
    raise UserError(
        f"batch.tokens {batch_tokens} is not divisible by batch.micro {micro} x sequence_len "
        f"{sequence_len} x {world_size} device{'s' if world_size > 1 else ''} = {chunk}: the "
        f"nearest that are: {' and '.join(nearest)}"
    )


def peak_flops(device: torch.device) -> float:
    """Dense bf16 FLOPs per second of the device; NaN where it is not known."""
    if device.type != "cuda":
        return float("nan")
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), float("nan"))


def make_plan(config: TransformerConfig, budget: BudgetConfig, batch_tokens: int) -> dict:
    """What a run costs on whatever devices; sizes in bytes."""
    from bov_lightning.model.values import source_class

    steps = horizon(budget, config, batch_tokens)
    counts = count_parameters(config)
    cached = [True] * config.n_layer
    if not config.value.add_context and not source_class(config.value.source).value_cache:
        for layer in config.target_layers:
            cached[layer] = False
    kv_standard = 2 * 2 * config.d_value * config.n_layer
    saved = 2 * config.d_value * cached.count(False)
    table_bytes = 2 * counts.tables
    return {
        "flops_per_token": flops_per_token(config),
        "iterations": steps,
        "tokens": steps * batch_tokens,
        "flops": float(flops_per_token(config) * steps * batch_tokens),
        "params": vars(counts),
        "cache": {
            "bytes_per_token": kv_standard - saved,
            "bytes_per_token_standard": kv_standard,
            "break_even_tokens": -(-table_bytes // saved) if saved else None,
        },
    }
