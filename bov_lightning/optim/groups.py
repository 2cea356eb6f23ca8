"""Learning rates and weight decay per parameter group: the paper's recipe as data."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from bov_lightning.model.config import TransformerConfig
from bov_lightning.recipe.budget import (
    REFERENCE_BATCH_TOKENS,
    REFERENCE_D_MODEL,
    scaling_parameters,
)


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates at the top of the schedule, weight decay and the schedule's shape."""

    matrix_lr: float = 0.02
    """Muon's learning rate for the matrices of the blocks."""

    embedding_lr: float = 0.3
    """AdamW's learning rate for the token embedding."""

    table_lr: float = 0.15
    """AdamW's learning rate for value tables."""

    head_lr: float = 0.008
    """AdamW's learning rate for the output head."""

    scalar_lr: float = 0.5
    """AdamW's learning rate for learned coefficients; that of the context term is a hundredth."""

    smear_lr: float = 0.2
    """AdamW's learning rate for the smear. Never scaled."""

    weight_decay: float = 0.28
    """Muon's cautious weight decay at the start; a cosine takes it to 0."""

    muon_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What Muon's orthogonalisation is computed in; float32 makes runs on different numbers of
    devices agree to rounding, bfloat16 is the paper's."""

    scale_to_model: bool = False
    """Whether the numbers above are those of the 12-layer, d_model 768 reference model at 524,288
    tokens a step, to be scaled to this model and batch by the paper's rules; false: used as they
    stand. Meant for models of 12 layers and more."""

    warmup_steps: int = 40
    """Steps over which learning rates rise linearly from 0."""

    warmdown_fraction: float = 0.65
    """Last part of the run, over which learning rates fall linearly."""

    final_lr_fraction: float = 0.05
    """Where the learning rates end, as a fraction of their top."""


def scaled(
    optimizer: OptimizerConfig, config: TransformerConfig, batch_tokens: int
) -> dict[str, float]:
    """Learning rates and weight decay of this model and batch, by the name of the config's field.

    With ``scale_to_model``: all but the smear's times sqrt(batch / 524,288); those of embedding,
    tables and head also times (d_model / 768)^-0.5; weight decay times sqrt(batch / 524,288) and
    the ratio of the reference model's scaling parameters to this model's.
    """
    names = ("matrix_lr", "embedding_lr", "table_lr", "head_lr", "scalar_lr", "smear_lr")
    values = {name: getattr(optimizer, name) for name in (*names, "weight_decay")}
    if not optimizer.scale_to_model:
        return values
    batch = (batch_tokens / REFERENCE_BATCH_TOKENS) ** 0.5
    width = (config.d_model / REFERENCE_D_MODEL) ** -0.5
    for name in names[:-1]:
        values[name] *= batch
    for name in ("embedding_lr", "table_lr", "head_lr"):
        values[name] *= width
    values["weight_decay"] *= batch * scaling_parameters(config, reference=True)
    values["weight_decay"] /= scaling_parameters(config)
    return values


def build_groups(
    model: nn.Module, optimizer: OptimizerConfig, config: TransformerConfig, batch_tokens: int
) -> list[dict]:
    """Parameter groups for `MuonAdamW`, in a fixed order, each with its ``name``."""
    rate = scaled(optimizer, config, batch_tokens)

    def adamw(lr: float, betas: tuple[float, float], weight_decay: float) -> dict:
        return dict(kind="adamw", lr=lr, betas=betas, eps=1e-10, weight_decay=weight_decay)

    settings = {
        "head": adamw(rate["head_lr"], (0.8, 0.96), 0.01),
        "embedding": adamw(rate["embedding_lr"], (0.8, 0.995), 0.001),
        "table": adamw(rate["table_lr"], (0.8, 0.995), 0.01),
        "smear": adamw(rate["smear_lr"], (0.8, 0.95), 0.0),
        "context_coefficient": adamw(0.01 * rate["scalar_lr"], (0.8, 0.95), 0.05),
        "coefficient": adamw(rate["scalar_lr"], (0.96, 0.95), 0.0),
        "matrix": dict(
            kind="muon", lr=rate["matrix_lr"], momentum=0.95, beta2=0.9,
            weight_decay=rate["weight_decay"], dtype=getattr(torch, optimizer.muon_dtype),
        ),
    }  # fmt: skip
    parameters = model.grouped_parameters()
    unknown = set(parameters) - set(settings)
    if unknown:
        raise ValueError(f"no optimizer settings for parameter group {', '.join(sorted(unknown))}")
    return [
        {"name": name, "params": parameters[name], **group}
        for name, group in settings.items()
        if name in parameters
    ]
