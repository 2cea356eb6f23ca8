"""Reads checkpoints, whole or each rank its part, without running anybody's code."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from bov_lightning.checkpoint.directory import (
    CONFIG,
    TOKENIZER,
    TRAINING,
    WEIGHTS,
    find_checkpoint,
)
from bov_lightning.checkpoint.placement import place
from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.counting import meta_model
from bov_lightning.model.transformer import Transformer
from bov_lightning.recipe.building import build
from bov_lightning.recipe.keys import check_keys
from bov_lightning.recipe.overlays import read_yaml


def read_config(checkpoint: Path) -> TransformerConfig:
    """The network's shape."""
    path = checkpoint / CONFIG
    section = read_yaml(path).get("model")
    config = section.get("config") if isinstance(section, dict) else None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no model.config")
    check_keys(config, str(path), TransformerConfig, "model.config")
    return build(TransformerConfig, config, str(path), "model.config")


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """Shapes and dtypes of the tensors in a directory of safetensors, on the meta device."""
    # Whatever a stranger's file provokes is reported as a file that cannot be read.
    try:
        stored = dcp.HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
        return {
            name: torch.empty(facts.size, dtype=facts.properties.dtype, device="meta")
            for name, facts in stored.items()
        }
    except Exception as error:
        raise UserError(f"{directory} cannot be read: {error}") from error


def read_tensors(directory: Path, into: dict[str, Tensor], **options) -> None:
    """Fills tensors, sharded ones too, from a directory of safetensors that has all of them.

    ``options`` go to ``torch.distributed.checkpoint.load``. What cannot be read is a `UserError`.
    """
    reader = dcp.HuggingFaceStorageReader(str(directory))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(into, storage_reader=reader, **options)
    except (Exception, dcp.CheckpointException) as error:
        failures = getattr(error, "failures", {})
        cause = next(iter(failures.values()))[0] if failures else error
        raise UserError(f"{directory} cannot be read: {cause}") from error


def read_whole(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory of safetensors, put together, on the CPU."""
    stored = stored_tensors(directory)
    try:
        tensors = {name: torch.empty_like(t, device="cpu") for name, t in stored.items()}
    except RuntimeError as error:
        raise UserError(f"{directory} cannot be read: {error}") from error
    read_tensors(directory, tensors, no_dist=True)
    return tensors


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The whole weights by their name in `Transformer`."""
    return read_whole(checkpoint / WEIGHTS)


def read_training_state(checkpoint: Path) -> dict[str, Any]:
    """Everything but the weights that resuming needs."""
    path = checkpoint / TRAINING
    if not path.is_file():
        raise UserError(f"{checkpoint} holds weights only, which a run cannot be resumed from")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever a damaged or a stranger's file provokes.
        raise UserError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from error


def key_problem(missing: Iterable[str], unknown: Iterable[str]) -> str | None:
    """Why weights by these names are not those of a model, in words; None where they are.

    Args:
        missing: names that the model has and the file has not.
        unknown: the reverse.
    """
    missing, unknown = sorted(missing), sorted(unknown)
    parts = []
    if missing:
        parts.append(f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if unknown:
        verb = "is" if len(unknown) == 1 else "are"
        parts.append(f"{_some(unknown)} {verb} unknown to the configuration")
    for name in unknown:
        # What wraps a model while it is trained puts its own name in front of all others.
        for own in missing:
            if name.endswith(f".{own}"):
                prefix = name.removesuffix(own)
                parts.append(f"{prefix!r} stands before its names: save it again without")
                return "; ".join(parts)
    return "; ".join(parts) or None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def load_weights(model: Transformer, weights: dict[str, Tensor], origin: Path) -> None:
    """Copies the weights into the model; another architecture is a `UserError`."""
    own = model.state_dict()
    if problem := key_problem(own.keys() - weights.keys(), weights.keys() - own.keys()):
        raise UserError(f"{origin} is of another architecture: {problem}")
    for name in sorted(own):
        if own[name].shape != weights[name].shape:
            raise UserError(
                f"{origin} is of another architecture: {name} is {tuple(weights[name].shape)} "
                f"there, {tuple(own[name].shape)} in the configuration"
            )
    model.load_state_dict(weights, assign=own and next(iter(own.values())).is_meta)


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first tensor with a NaN or an infinite number, and how many it holds; None without."""
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
        if n := int((~wide.isfinite()).sum()):
            return f"{name} holds {n} of {tensor.numel():,} numbers that are not finite"
    return None


def load_tokenizer(checkpoint: Path) -> Any:
    """The checkpoint's tokenizer as a ``transformers`` fast tokenizer; None where it has none."""
    if not (checkpoint / TOKENIZER).is_dir():
        return None
    from data_modules.tokenizer import transformers_tokenizer

    return transformers_tokenizer(checkpoint / TOKENIZER)


def load_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    bank_device: str | None = None,
) -> tuple[Transformer, Any]:
    """The model of a run or a checkpoint, and its tokenizer; see `bov_lightning.load`."""
    checkpoint = find_checkpoint(path)
    model = meta_model(read_config(checkpoint))
    load_weights(model, read_weights(checkpoint), checkpoint)
    files = list((checkpoint / WEIGHTS).glob("*.safetensors"))
    # Tables written by several ranks lie in pieces, which cannot be mapped.
    whole = files if len(files) == 1 else []
    place(model, device, dtype or torch.float32, bank_device, whole)
    return model.eval(), load_tokenizer(checkpoint)
