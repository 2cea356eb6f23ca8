"""What devices can do: FLOPs per second and memory."""

import math
import re

import torch

from bov_lightning.errors import UserError

PEAK_FLOPS = {
    "A100": 312e12,
    "B200": 2250e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOPs per second by words of the device's name, from the vendor's data sheets."""


def peak_flops(device: torch.device) -> float:
    """Dense bf16 FLOPs per second of the device; NaN where it is not known."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else math.nan


def peak_of(name: str) -> float:
    """The entry of `PEAK_FLOPS` that says most of a device's ``name``; NaN without one."""
    words = set(name.replace("-", " ").split())
    known = [model for model in PEAK_FLOPS if set(model.split()) <= words]
    return PEAK_FLOPS[max(known, key=lambda model: len(model.split()))] if known else math.nan


def parse_bytes(text: str) -> int:
    """Bytes from ``80GB``, ``79.1 GiB`` or ``2000000``; anything else is a `UserError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B|B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise UserError(f"--memory {text}: give a size such as 80GB or 79.1GiB")
    number, prefix, binary = match.groups()
    power = " KMGT".index(prefix.upper()) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def device_memory() -> int | None:
    """Bytes of the smallest CUDA device of this machine; None if it has none."""
    sizes = [
        torch.cuda.get_device_properties(index).total_memory
        for index in range(torch.cuda.device_count())
    ]
    return min(sizes, default=None)
