"""Checkpoint directories: written whole or not at all, read without running anybody's code.

checkpoints/step-00000100/
    config.yaml          the resolved recipe (an import's: the model section alone)
    tokenizer/           a transformers tokenizer, where there is one
    model.safetensors    the weights
    training.pt          optimizer, schedule, loops, data position (absent in an import)
    checkpoint.json      step and version; written last, so its presence means complete
"""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bov_lightning import __version__
from bov_lightning.errors import UserError
from bov_lightning.files import write_directory

if TYPE_CHECKING:
    import torch

    from bov_lightning.model.config import TransformerConfig
    from bov_lightning.model.transformer import Transformer

MARKER = "checkpoint.json"
WEIGHTS = "model.safetensors"
TRAINING = "training.pt"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer"


def step_name(step: int) -> str:
    """The directory name of the checkpoint at ``step``."""
    return f"step-{step:08d}"


def is_complete(directory: Path) -> bool:
    """Whether the directory is a checkpoint that was written to its end."""
    return (directory / MARKER).is_file()


def complete_checkpoints(run: Path) -> list[Path]:
    """All complete checkpoints of a run directory, oldest first."""
    found = [
        path
        for path in (run / "checkpoints").glob("step-*")
        if re.fullmatch(r"step-\d{8,}", path.name) and is_complete(path)
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at ``path``: itself, or the newest complete one of a run directory."""
    path = Path(path)
    if is_complete(path):
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a run directory or a checkpoint")
    if found := complete_checkpoints(path):
        return found[-1]
    raise UserError(f"{path} is no checkpoint, nor a run directory that holds a complete one")


def is_export(directory: Path) -> bool:
    """Whether a directory is a `transformers` export of ours: see `bov_lightning.hf`."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "bov"


def read_marker(checkpoint: Path) -> dict:
    """Step and version of a checkpoint."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text())
        return {**marker, "step": int(marker["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / MARKER} cannot be read: {error}") from error


def read_config(checkpoint: Path) -> "TransformerConfig":
    """The network's shape."""
    from bov_lightning.model.config import TransformerConfig
    from bov_lightning.recipe import build, check_keys, read_yaml

    path = checkpoint / CONFIG
    section = read_yaml(path).get("model")
    config = section.get("config") if isinstance(section, dict) else None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no model.config")
    check_keys(config, str(path), TransformerConfig, "model.config")
    return build(TransformerConfig, config, str(path), "model.config")


def read_weights(checkpoint: Path) -> dict[str, "torch.Tensor"]:
    """The weights by their name in `Transformer`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(checkpoint / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{checkpoint / WEIGHTS} cannot be read: {error}") from error


def read_training_state(checkpoint: Path) -> dict[str, Any]:
    """Everything but the weights that resuming needs."""
    import pickle

    import torch

    path = checkpoint / TRAINING
    if not path.is_file():
        raise UserError(f"{checkpoint} holds weights only, which a run cannot be resumed from")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def load_weights(model: "Transformer", weights: dict[str, "torch.Tensor"], origin: Path) -> None:
    """Copies the weights into the model; another architecture is a `UserError`."""
    own = model.state_dict()
    for name in sorted(set(own) | set(weights)):
        if name not in weights or name not in own:
            where = "missing from" if name in own else "unknown to the configuration, but in"
            raise UserError(
                f"{origin} is of another architecture: {name} is {where} the checkpoint"
            )
        if own[name].shape != weights[name].shape:
            raise UserError(
                f"{origin} is of another architecture: {name} is {tuple(weights[name].shape)} "
                f"there, {tuple(own[name].shape)} in the configuration"
            )
    model.load_state_dict(weights, assign=own and next(iter(own.values())).is_meta)


def write_checkpoint(
    target: Path,
    step: int,
    weights: dict[str, "torch.Tensor"],
    config_yaml: str,
    training_state: dict[str, Any] | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Writes a checkpoint directory, complete or absent.

    Args:
        target: the directory.
        step: optimizer steps behind it.
        weights: by their name in `Transformer`.
        config_yaml: the resolved recipe.
        training_state: what resuming needs beside the weights; plain containers and tensors.
        tokenizer: a directory to copy.
    """
    import torch
    from safetensors.torch import save_file

    def write(aside: Path) -> None:
        (aside / CONFIG).write_text(config_yaml, encoding="utf-8")
        if tokenizer is not None:
            shutil.copytree(tokenizer, aside / TOKENIZER)
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in weights.items()}, aside / WEIGHTS
        )
        if training_state is not None:
            torch.save(training_state, aside / TRAINING)
        marker = {"step": step, "bov_lightning": __version__}
        (aside / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")

    write_directory(target, write)


def load(
    path: str | Path,
    *,
    device: "str | torch.device" = "cpu",
    dtype: "torch.dtype | None" = None,
    bank_device: str | None = None,
) -> tuple["Transformer", Any]:
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
    import torch

    from bov_lightning.model.transformer import Transformer
    from bov_lightning.placement import place

    if is_export(Path(path)):
        from bov_lightning.hf import load_export

        return load_export(Path(path), device, dtype or torch.float32, bank_device)
    checkpoint = find_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(read_config(checkpoint))
    load_weights(model, read_weights(checkpoint), checkpoint)
    place(model, device, dtype or torch.float32, bank_device, [checkpoint / WEIGHTS])
    return model.eval(), load_tokenizer(checkpoint)


def load_tokenizer(checkpoint: Path) -> Any:
    """The checkpoint's tokenizer as a ``transformers`` fast tokenizer; None where it has none."""
    if not (checkpoint / TOKENIZER).is_dir():
        return None
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(checkpoint / TOKENIZER)
