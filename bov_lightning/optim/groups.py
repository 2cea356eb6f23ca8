"""Learning rates and weight decay per parameter group: the paper's recipe as data."""

import math

import torch
from torch import nn

from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.counting import (
    REFERENCE_BATCH_TOKENS,
    REFERENCE_D_MODEL,
    scaling_parameters,
)
from bov_lightning.optim.config import OptimizerConfig


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
    found: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter, group, factor in model.rated_parameters():
        if group not in settings:
            raise UserError(
                f"optimizer_groups puts {name} into {group!r}, which is no group: use one of "
                f"{', '.join(settings)}"
            )
        if group == "matrix" and parameter.ndim != 2:
            raise UserError(
                f"{name} has {parameter.ndim} dimensions and is in no optimizer group, so Muon "
                "would train it, which takes matrices only: name it in optimizer_groups"
            )
        if not 0 <= factor < math.inf:
            raise UserError(f"optimizer_groups multiplies the rate of {name} by {factor}")
        found.setdefault((group, factor), []).append(parameter)
    return [
        {"name": name, "params": parameters, **group, "lr": factor * group["lr"]}
        for name, group in settings.items()
        for (own, factor), parameters in found.items()
        if own == name
    ]
