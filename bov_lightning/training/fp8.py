"""The blocks' matrix products in fp8, by torchao: an option for recent GPUs."""

import torch
from torch import nn

from bov_lightning.errors import UserError
from bov_lightning.model.transformer import Transformer

CAPABILITY = (8, 9)
"""The first CUDA devices that multiply fp8 numbers: Ada and Hopper."""


def check_fp8_device(device: torch.device) -> None:
    """A device without fp8 products is a `UserError`."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(
            f"fp8 true needs a GPU of compute capability {'.'.join(map(str, CAPABILITY))} (Ada, "
            f"Hopper) or newer, and this run trains on {device}: set fp8 false"
        )


def use_fp8(model: Transformer, emulate: bool = False) -> None:
    """Has every linear layer of the blocks multiply in fp8, forwards and backwards.

    Each tensor is scaled by its largest number at every use. Parameters, their names and their
    dtype stay as they are, and so do embedding, tables and head. Products need sides that 16
    divides: others, such as the gates of 12 channels, stay as they are too.

    Args:
        model: on any device, before it is compiled and sharded.
        emulate: round to fp8 and multiply in the wider dtype, which works everywhere, slowly.

    Raises:
        UserError: torchao is missing.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError(
            "fp8 true needs torchao: pip install 'bov-lightning[fp8]', or set fp8 false"
        ) from None

    def fits(module: nn.Linear, name: str) -> bool:
        return not (module.in_features % 16 or module.out_features % 16)

    for block in model.blocks:
        convert_to_float8_training(
            block, config=Float8LinearConfig(emulate=emulate), module_filter_fn=fits
        )
