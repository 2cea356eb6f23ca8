"""How FSDP2 cuts a model up: the parts of a strategy that need no Trainer.

FSDP2 and DTensors bring torch's compiler and sympy along, which takes longer than `bov plan` may:
they are imported where something is really sharded.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bov_lightning.model.values import BankOfValues

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from bov_lightning.model.transformer import Transformer


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. There is none where nobody has imported them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharded or not."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def make_mesh(device_type: str, world_size: int, replicate: int) -> "DeviceMesh":
    """One dimension, ``shard``, or with copies two: ``replicate`` and ``shard``."""
    from torch.distributed.device_mesh import init_device_mesh

    if replicate == 1:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    shape = (replicate, world_size // replicate)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: "Transformer", mesh: "DeviceMesh", param_dtype: torch.dtype | None) -> None:
    """Makes each value table, each block, the embedding and the head an FSDP2 unit of its own.

    A table in its block's unit would be gathered, and its gradient reduced, together with the
    block's matrices, in one huge buffer.
    """
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    # Tables in the host's memory are nobody's.
    banks = (module for module in model.modules() if isinstance(module, BankOfValues))
    ignored = {bank.table for bank in banks if bank.trains_on_host}
    how: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": ignored}
    if mesh.size() == 1:
        how["reshard_after_forward"] = False  # `gathered_once` says why
    for block in model.blocks:
        source = block.attention.value.source
        if source is not None and not ignored.issuperset(source.parameters()):
            fully_shard(source, **how)
            # Decoding reads the table by this method, which must gather it as forward does.
            register_fsdp_forward_method(source, "attend_past")
        fully_shard(block, **how)
    for part in (model.embedding, model.head, model):
        fully_shard(part, **how)


@contextmanager
def gathered_once(model: "Transformer", world_size: int) -> Iterator[None]:
    """Around all micro-steps of an optimizer step but the last.

    On one device, where there is nobody to share with, the bf16 copies of parameters stay until the
    step ends, and gradients add up in fp32 where they are. FSDP2 would make the copies twice in
    each micro-step, and pass the gradients through two buffers: 46 bytes per parameter are read and
    written instead of 10. The sums are the same to the bit. Over several devices nothing changes,
    since there whole copies and gradients are what sharding saves the memory of.
    """
    from torch.distributed.fsdp import FSDPModule

    alone = world_size == 1 and isinstance(model, FSDPModule)
    if alone:
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(False)
    try:
        yield
    finally:
        if alone:
            model.set_requires_gradient_sync(True)
            model.set_reshard_after_backward(True)


def reshard(model: nn.Module) -> None:
    """Lets go of gathered parameters.

    FSDP2's root keeps its own after a forward pass, for a backward pass that need not follow.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def recompute_activations(model: "Transformer") -> None:
    """Makes each block keep its inputs only, and compute the rest again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@torch.no_grad()
def write_part(parameter: Tensor, whole: Tensor) -> None:
    """Copies this rank's rows of a whole CPU tensor into a parameter, sharded or not."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        own = distribute_tensor(
            whole.to(parameter.device), parameter.device_mesh, parameter.placements,
            src_data_rank=None,
        )  # fmt: skip
        parameter.to_local().copy_(own.to_local())
    else:
        parameter.copy_(whole)
