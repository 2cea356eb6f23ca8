"""Where the weights of a loaded model go; its value tables may stay elsewhere."""

import json
from pathlib import Path

import torch

from bov_lightning.errors import UserError
from bov_lightning.model.offload import FileTable, HostTable, MemoryTable
from bov_lightning.model.transformer import Transformer
from bov_lightning.model.values import BankOfValues

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Names in a safetensors header."""


def place(
    model: Transformer,
    device: str | torch.device,
    dtype: torch.dtype,
    bank_device: str | None,
    files: list[Path],
    prefix: str = "",
) -> None:
    """Copies a model's weights, which may be mapped from files, to a device.

    Args:
        model: with weights.
        device: where to.
        dtype: in which dtype.
        bank_device: ``cpu`` or ``mmap`` for value tables, see `bov_lightning.load`; or None.
        files: the safetensors files that hold whole tensors of these weights.
        prefix: of names in these files.
    """
    device = torch.device(device)
    if bank_device not in (None, "cpu", "mmap"):
        raise UserError(f"bank_device is {bank_device!r}: use cpu or mmap, or leave it out")
    if bank_device is not None:
        for name, module in model.named_modules():
            if isinstance(module, BankOfValues) and module.reads_as_bank():
                module.offload(_host_table(module, name, bank_device, device, dtype, files, prefix))
        if model.grouped_parameters().get("table"):
            raise UserError(
                f"bank_device {bank_device}: value.source {model.config.value.source} keeps its "
                "tables on the device; only a bank, or a class that inherits forward, attend_past "
                "and all of its tables from BankOfValues, can leave them elsewhere"
            )
    for tensor in (*model.parameters(), *model.buffers()):
        # Row numbers and the like are none that a dtype is meant for.
        own = dtype if tensor.is_floating_point() else tensor.dtype
        tensor.data = tensor.data.to(device=device, dtype=own, copy=True)


def _host_table(
    bank: BankOfValues, name: str, bank_device: str, device: torch.device, dtype: torch.dtype,
    files: list[Path], prefix: str,
) -> HostTable:  # fmt: skip
    if bank_device == "cpu":
        return MemoryTable(bank.table.detach().to(dtype=dtype, copy=True), device)
    for file in files:
        if file.is_file() and (found := find_table(file, f"{prefix}{name}.table")):
            return found
    raise UserError(
        "bank_device mmap needs each table whole in one safetensors file, but several ranks wrote "
        "these: bov export the run first"
    )


def find_table(file: Path, name: str) -> FileTable | None:
    """A table inside of a safetensors file, unread; None where the file has no such tensor."""
    with open(file, "rb") as opened:
        n_header = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(n_header)).get(name)
    if entry is None:
        return None
    offset = 8 + n_header + entry["data_offsets"][0]
    return FileTable(file, offset, tuple(entry["shape"]), DTYPES[entry["dtype"]])
