"""How a recipe's run spreads over devices, known before any process starts."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from bov_lightning.errors import UserError

PARAM_DTYPES = {"32-true": None, "32": None, 32: None, "bf16-mixed": torch.bfloat16}
"""What trainer.precision means under FSDP2: the dtype of gathered parameters and activations."""


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
        """Whether FSDP2 takes part: one device in fp32 has nothing to gain from it."""
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
    sharded, precision = is_sharded_strategy(strategy), trainer.get("precision")
    if not sharded and precision not in (None, *PARAM_DTYPES):
        raise UserError(f"the memory of trainer.precision {precision} under ddp cannot be planned")
    half = param_dtype_of(precision) is not None
    if world_size is None:
        world_size = count_devices(trainer.get("devices", 1)) * int(trainer.get("num_nodes") or 1)
    replicate = arguments.get("replicate", 1)
    check_replicate(world_size, replicate)
    return Layout(world_size, sharded, replicate, half, trainer.get("accelerator") != "cpu")


def is_sharded_strategy(name: str | None) -> bool:
    """Whether trainer.strategy, a short name or a class path, means FSDP2 and not DDP.

    Raises:
        UserError: it means neither.
    """
    short = str(name).rpartition(".")[2]
    if short in ("None", "auto", "fsdp", "ShardedStrategy"):
        return True
    if short in ("ddp", "ReplicatedStrategy"):
        return False
    raise UserError(
        f"trainer.strategy {name!r} is not supported: use fsdp, ddp, or the class_path "
        "bov_lightning.ShardedStrategy with replicate for HSDP"
    )


def param_dtype_of(precision: str | int | None) -> torch.dtype | None:
    """Of gathered parameters and activations under FSDP2; None: fp32.

    Raises:
        UserError: a trainer.precision that FSDP2 does not have.
    """
    if precision not in (None, *PARAM_DTYPES):
        options = ", ".join(str(name) for name in PARAM_DTYPES)
        raise UserError(f"trainer.precision {precision} is not supported by fsdp: use {options}")
    return PARAM_DTYPES.get(precision)


def check_replicate(world_size: int, replicate: int) -> None:
    """A mesh that the devices cannot form is a `UserError`."""
    if not isinstance(replicate, int) or replicate < 1 or world_size % replicate:
        raise UserError(
            f"{world_size} devices cannot hold {replicate} equal copies of the "
            "model: trainer.strategy.init_args.replicate must divide their number"
        )


def count_devices(devices: Any) -> int:
    """What trainer.devices stands for, on one node; what stands for nothing is a `UserError`."""
    numbers = devices if isinstance(devices, list) else str(devices).strip(" ,").split(",")
    texts = [str(number).strip() for number in numbers]
    if texts in (["auto"], ["-1"], ["None"]):
        return max(1, torch.cuda.device_count())
    is_list = isinstance(devices, list) or "," in str(devices)
    if not texts or not all(re.fullmatch(r"[0-9]{1,6}", text) for text in texts):
        found = 0
    else:
        found = len(set(texts)) if is_list else int(texts[0])
    if found < 1:
        raise UserError(
            f"trainer.devices is {devices!r}: give a number from 1, auto, or which ones, "
            "such as [0, 1]"
        )
    return found
