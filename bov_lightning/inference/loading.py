"""`bov_lightning.load`: a model and its tokenizer from whatever lies at a path."""

from pathlib import Path
from typing import Any

import torch

from bov_lightning.checkpoint.reading import load_checkpoint
from bov_lightning.errors import UserError
from bov_lightning.interop.hf_import import is_export, load_export
from bov_lightning.kinds import home
from bov_lightning.model.transformer import Transformer


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    bank_device: str | None = None,
) -> tuple[Transformer, Any]:
    """The model, in eval mode, and its tokenizer.

    Args:
        path: a run directory (its newest complete checkpoint), a checkpoint, an import or an
            export.
        device: where the weights go.
        dtype: their dtype; fp32 if not given.
        bank_device: where value tables go instead: ``cpu`` (pinned memory beside a GPU) or ``mmap``
            (they stay in the file); only the rows of ids that are seen then come to the device.

    Returns:
        The `Transformer`, and a ``transformers`` fast tokenizer, or None where the checkpoint has
        none.

    Raises:
        UserError: nothing there, not readable, or weights that do not fit the configuration.
    """
    path = Path(home(str(path)))
    read = load_export if is_export(path) else load_checkpoint
    return read(path, device, dtype or torch.float32, bank_device)


def check_device(device: str) -> None:
    """A ``--device`` that this machine lacks is a `UserError`."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no usable GPU; use --device cpu")
