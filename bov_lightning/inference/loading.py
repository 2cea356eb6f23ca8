"""`bov_lightning.load`: a model and its tokenizer from whatever lies at a path."""

import json
from pathlib import Path
from typing import Any

import torch

from bov_lightning.checkpoint.directory import TOKENIZER, find_checkpoint, is_export
from bov_lightning.checkpoint.reading import load_checkpoint
from bov_lightning.errors import UserError
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
    read = load_checkpoint
    if is_export(path):
        # `transformers` and its models take seconds to import, and a run needs none of it.
        from bov_lightning.interop.hf_import import load_export as read
    return read(path, device, dtype or torch.float32, bank_device)


def end_tokens(path: str | Path, tokenizer: Any) -> set[int]:
    """Ids that end a text: all that tokenizer and generation_config.json name.

    Args:
        path: what `load` took.
        tokenizer: what it gave; a document ends where the next one starts, too.

    Raises:
        UserError: a generation_config.json that is no JSON object.
    """
    path = Path(path)
    directory = path if is_export(path) else find_checkpoint(path) / TOKENIZER
    ends = token_ids([tokenizer.bos_token_id, tokenizer.eos_token_id])
    # An export without a generation_config.json may name them in its config.json.
    for file in (directory / "generation_config.json", directory / "config.json"):
        if not file.is_file():
            continue
        try:
            return ends | token_ids(json.loads(file.read_text(encoding="utf-8"))["eos_token_id"])
        except KeyError:
            continue
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
    return ends


def token_ids(value: Any) -> set[int]:
    """The ids in a field that may hold none, one or several."""
    values = value if isinstance(value, list | tuple) else [value]
    return {id_ for id_ in values if type(id_) is int and id_ >= 0}


def check_device(device: str) -> None:
    """A ``--device`` that this machine lacks is a `UserError`."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no usable GPU; use --device cpu")
