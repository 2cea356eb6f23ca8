"""How a recipe's run spreads over devices, known before any process starts."""

from dataclasses import dataclass
from typing import Any

import torch

from bov_lightning.distributed.sharding import PARAM_DTYPES, check_precision, check_replicate
from bov_lightning.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How a run spreads over devices."""

    world_size: int = 1
    sharded: bool = True
    """FSDP2; else DDP."""
    replicate: int = 1
    """Copies of the model, each sharded over world size / replicate devices."""
    half: bool = False
    """bf16 activations and products."""
    cuda: bool = False
    """Whether the device is a GPU: attention and loss choose by it."""

    @property
    def shards(self) -> bool:
        """Whether FSDP2 takes part, as `ShardedStrategy.build` decides it."""
        return self.sharded and (self.world_size > 1 or self.half)


def read_layout(trainer: dict[str, Any], world_size: int | None = None) -> Layout:
    """The layout that a recipe's trainer section asks for.

    Args:
        trainer: the section.
        world_size: devices of the run; None: trainer.devices x trainer.num_nodes.

    Raises:
        UserError: what `bov fit` would refuse too, or a precision that cannot be planned.
    """
    strategy, arguments = trainer.get("strategy"), {}
    if "class_path" in (strategy or ""):  # a mapping, or jsonargparse's Namespace
        strategy, arguments = strategy["class_path"], strategy.get("init_args") or {}
    name = str(strategy).rpartition(".")[2]
    if name not in ("None", "auto", "fsdp", "ShardedStrategy", "ddp", "ReplicatedStrategy"):
        raise UserError(f"trainer.strategy {strategy!r} is not supported: use fsdp or ddp")
    sharded = name not in ("ddp", "ReplicatedStrategy")
    precision = trainer.get("precision")
    if sharded:
        check_precision(precision)
    elif precision not in (None, *PARAM_DTYPES):
        raise UserError(f"the memory of trainer.precision {precision} under ddp cannot be planned")
    if world_size is None:
        world_size = _n_device(trainer.get("devices", 1)) * int(trainer.get("num_nodes") or 1)
    replicate = int(arguments.get("replicate", 1))
    check_replicate(world_size, replicate)
    half = PARAM_DTYPES.get(precision) is not None
    return Layout(world_size, sharded, replicate, half, trainer.get("accelerator") != "cpu")


def _n_device(devices: Any) -> int:
    """What trainer.devices stands for, on one node."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    return int(text) if text.isdigit() else max(1, torch.cuda.device_count())
