"""How FSDP2 cuts a model up: the parts of a strategy that need no Trainer."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from bov_lightning.errors import UserError
from bov_lightning.model.transformer import Transformer

PARAM_DTYPES = {"32-true": None, "32": None, 32: None, "bf16-mixed": torch.bfloat16}
"""What trainer.precision means under FSDP2: the dtype of gathered parameters and activations."""


def check_precision(precision: str | int | None) -> None:
    """A trainer.precision that FSDP2 does not have is a `UserError`."""
    if precision not in (None, *PARAM_DTYPES):
        options = ", ".join(str(name) for name in PARAM_DTYPES)
        raise UserError(f"trainer.precision {precision} is not supported by fsdp: use {options}")


def check_replicate(world_size: int, replicate: int) -> None:
    """A mesh that the devices cannot form is a `UserError`."""
    if world_size % replicate:
        raise UserError(
            f"{world_size} devices cannot hold {replicate} equal copies of the "
            "model: trainer.strategy.init_args.replicate must divide their number"
        )


def make_mesh(device_type: str, world_size: int, replicate: int) -> DeviceMesh:
    """One dimension, ``shard``, or with copies two: ``replicate`` and ``shard``."""
    if replicate == 1:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    shape = (replicate, world_size // replicate)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: Transformer, mesh: DeviceMesh, param_dtype: torch.dtype | None) -> None:
    """Makes each value table, each block, the embedding and the head an FSDP2 unit of its own.

    A table in its block's unit would be gathered, and its gradient reduced, together with the
    block's matrices, in one huge buffer.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        source = block.attention.value.source
        if source is not None and any(True for _ in source.parameters()):
            fully_shard(source, mesh=mesh, mp_policy=policy)
            # Decoding reads the table by this method, which must gather it as forward does.
            register_fsdp_forward_method(source, "attend_past")
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for part in (model.embedding, model.head, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def reshard(model: nn.Module) -> None:
    """Lets go of gathered parameters.

    FSDP2's root keeps its own after a forward pass, for a backward pass that need not follow.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def recompute_activations(model: Transformer) -> None:
    """Makes each block keep its inputs only, and compute the rest again in the backward pass."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@torch.no_grad()
def write_part(parameter: Tensor, whole: Tensor) -> None:
    """Copies this rank's rows of a whole CPU tensor into a parameter, sharded or not."""
    if isinstance(parameter, DTensor):
        own = distribute_tensor(
            whole.to(parameter.device), parameter.device_mesh, parameter.placements,
            src_data_rank=None,
        )  # fmt: skip
        parameter.to_local().copy_(own.to_local())
    else:
        parameter.copy_(whole)
