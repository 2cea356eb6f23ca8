"""Learning rates, weight decay and schedule, as a recipe gives them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from bov_lightning.kinds import Range

RATE = Range(0, 100, soft=True)
"""Of learning rates; 0 trains nothing of that kind."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates at the top of the schedule, weight decay and the schedule's shape."""

    matrix_lr: Annotated[float, RATE] = 0.02
    """Muon's learning rate for the matrices of the blocks."""

    embedding_lr: Annotated[float, RATE] = 0.3
    """AdamW's learning rate for the token embedding."""

    table_lr: Annotated[float, RATE] = 0.15
    """AdamW's learning rate for value tables."""

    head_lr: Annotated[float, RATE] = 0.008
    """AdamW's learning rate for the output head."""

    scalar_lr: Annotated[float, RATE] = 0.5
    """AdamW's learning rate for learned coefficients; that of the context term is a hundredth."""

    smear_lr: Annotated[float, RATE] = 0.2
    """AdamW's learning rate for the smear. Never scaled."""

    weight_decay: Annotated[float, Range(0, 100, soft=True)] = 0.28
    """Muon's cautious weight decay at the start; a cosine takes it to 0."""

    muon_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What Muon's orthogonalisation is computed in; float32 makes runs on different numbers of
    devices agree to rounding, bfloat16 is the paper's."""

    scale_to_model: bool = False
    """Whether the numbers above are those of the 12-layer, d_model 768 reference model at 524,288
    tokens a step, to be scaled to this model and batch by the paper's rules; false: used as they
    stand. Meant for models of 12 layers and more."""

    warmup_steps: Annotated[int, Range(0, 2**40, soft=True)] = 40
    """Steps over which learning rates rise linearly from 0."""

    warmdown_fraction: Annotated[float, Range(0, 1, soft=True)] = 0.65
    """Last part of the run, over which learning rates fall linearly."""

    final_lr_fraction: Annotated[float, Range(0, 1, soft=True)] = 0.05
    """Where the learning rates end, as a fraction of their top."""
