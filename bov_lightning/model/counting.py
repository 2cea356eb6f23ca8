"""What a network has and costs, counted on the meta device: parameters and FLOPs."""

from dataclasses import dataclass, replace

import torch

from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.transformer import Transformer

REFERENCE_LAYERS = 12
REFERENCE_D_MODEL = 768
REFERENCE_BATCH_TOKENS = 2**19


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


def saved_cache_bytes(config: TransformerConfig) -> int:
    """Bytes of a bf16 value cache that decoding does not keep, per token, over all layers."""
    spared = sum(not b.attention.value.value_cache for b in meta_model(config).blocks)
    return 2 * config.d_value * spared


def break_even_tokens(config: TransformerConfig) -> int | None:
    """Cached tokens from which bf16 tables take less room than the caches that they save.

    None: there is no table, or it saves no cache.
    """
    saved = saved_cache_bytes(config)
    table_bytes = 2 * count_parameters(config).tables
    return -(-table_bytes // saved) if saved and table_bytes else None
