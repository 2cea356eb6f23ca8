"""Checkpoint directories: written whole or not at all, read without running anybody's code.

checkpoints/step-00000100/
    config.yaml          the resolved recipe (an import's: the model section alone)
    tokenizer/           a transformers tokenizer, where there is one
    weights/             safetensors, one file per rank that wrote; any number of ranks reads them
    optimizer/           the same for optimizer state and random states (absent in an import)
    training.pt          schedule, loops, data position (absent in an import)
    checkpoint.json      step, version, and size and checksum of every other file; written last, so
                         its presence means complete
"""

import json
import re
import shutil
import warnings
import zlib
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
WEIGHTS = "weights"
OPTIMIZER = "optimizer"
TRAINING = "training.pt"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer"


def step_name(step: int) -> str:
    """The directory name of the checkpoint at ``step``."""
    return f"step-{step:08d}"


def problem(directory: Path) -> str | None:
    """Why the directory is no complete checkpoint, by names and sizes alone; None if it is one."""
    try:
        files = read_marker(directory)["files"]
        for name, facts in files.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
    except UserError as error:
        missing = not (directory / MARKER).exists()
        return f"{MARKER} is missing: it was not written to its end" if missing else str(error)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return f"{MARKER} cannot be used: {error!r}"
    return None


def is_complete(directory: Path) -> bool:
    """Whether the directory is a checkpoint that was written to its end."""
    return (directory / MARKER).is_file() and problem(directory) is None


def step_directories(run: Path) -> list[Path]:
    """What looks like a checkpoint of a run directory, complete or not, oldest first."""
    found = [
        path
        for path in (run / "checkpoints").glob("step-*")
        if re.fullmatch(r"step-\d{8,}", path.name)
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a run's checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def complete_checkpoints(run: Path) -> list[Path]:
    """All complete checkpoints of a run directory, oldest first."""
    return [path for path in step_directories(run) if is_complete(path)]


def checksum(path: Path) -> int:
    """CRC-32 of a file: finds damage, not malice."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


def damaged_file(directory: Path, share: int = 0, of: int = 1) -> str | None:
    """The first file that is not what the marker says, among every ``of``-th; None if all are.

    Reads the files to their end.
    """
    for name, facts in sorted(read_marker(directory)["files"].items())[share::of]:
        try:
            if checksum(directory / name) != facts["crc32"]:
                return f"{name} is damaged: its checksum differs"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def file_facts(directory: Path, names: list[str]) -> dict[str, dict[str, int]]:
    """Size and checksum of files, as the marker lists them."""
    return {
        name: {"bytes": (directory / name).stat().st_size, "crc32": checksum(directory / name)}
        for name in names
    }


def write_marker(directory: Path, step: int, files: dict[str, dict[str, int]]) -> None:
    """Declares a checkpoint complete."""
    marker = {"step": step, "bov_lightning": __version__, "files": dict(sorted(files.items()))}
    (directory / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at ``path``: itself, or the newest complete one of a run directory."""
    path = Path(path)
    if is_complete(path):
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a run directory or a checkpoint")
    if (path / MARKER).exists():
        raise UserError(f"{path} is not usable: {problem(path)}")
    if found := complete_checkpoints(path):
        return found[-1]
    raise UserError(f"{path} is no checkpoint, nor a run directory that holds a complete one")


def is_export(directory: Path) -> bool:
    """Whether a directory is a `transformers` export of ours: see `interop.hf_export`."""
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
    from bov_lightning.recipe.sections import build, check_keys, read_yaml

    path = checkpoint / CONFIG
    section = read_yaml(path).get("model")
    config = section.get("config") if isinstance(section, dict) else None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no model.config")
    check_keys(config, str(path), TransformerConfig, "model.config")
    return build(TransformerConfig, config, str(path), "model.config")


def stored_tensors(directory: Path) -> dict[str, "torch.Tensor"]:
    """Shapes and dtypes of the tensors in a directory of safetensors, on the meta device."""
    import torch
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    # Whatever a stranger's file provokes is reported as a file that cannot be read.
    try:
        stored = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
        return {
            name: torch.empty(facts.size, dtype=facts.properties.dtype, device="meta")
            for name, facts in stored.items()
        }
    except Exception as error:
        raise UserError(f"{directory} cannot be read: {error}") from error


def read_tensors(directory: Path, into: dict[str, "torch.Tensor"], **options) -> None:
    """Fills tensors, sharded ones too, from a directory of safetensors that has all of them.

    ``options`` go to ``torch.distributed.checkpoint.load``. What cannot be read is a `UserError`.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(directory))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(into, storage_reader=reader, **options)
    except (Exception, dcp.CheckpointException) as error:
        failures = getattr(error, "failures", {})
        cause = next(iter(failures.values()))[0] if failures else error
        raise UserError(f"{directory} cannot be read: {cause}") from error


def read_whole(directory: Path) -> dict[str, "torch.Tensor"]:
    """All tensors of a directory of safetensors, put together, on the CPU."""
    import torch

    stored = stored_tensors(directory)
    try:
        tensors = {name: torch.empty_like(t, device="cpu") for name, t in stored.items()}
    except RuntimeError as error:
        raise UserError(f"{directory} cannot be read: {error}") from error
    read_tensors(directory, tensors, no_dist=True)
    return tensors


def read_weights(checkpoint: Path) -> dict[str, "torch.Tensor"]:
    """The whole weights by their name in `Transformer`."""
    return read_whole(checkpoint / WEIGHTS)


def read_training_state(checkpoint: Path) -> dict[str, Any]:
    """Everything but the weights that resuming needs."""
    import torch

    path = checkpoint / TRAINING
    if not path.is_file():
        raise UserError(f"{checkpoint} holds weights only, which a run cannot be resumed from")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever a damaged or a stranger's file provokes.
        raise UserError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from error


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
    tokenizer: Path | None = None,
) -> None:
    """Writes a checkpoint directory of whole weights alone, complete or absent.

    Args:
        target: the directory.
        step: optimizer steps behind it.
        weights: by their name in `Transformer`.
        config_yaml: the resolved recipe.
        tokenizer: a directory to copy.
    """
    from safetensors.torch import save_file

    def write(aside: Path) -> None:
        (aside / CONFIG).write_text(config_yaml, encoding="utf-8")
        if tokenizer is not None:
            shutil.copytree(tokenizer, aside / TOKENIZER)
        (aside / WEIGHTS).mkdir()
        whole = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
        save_file(whole, aside / WEIGHTS / "model.safetensors")
        write_marker(aside, step, file_facts(aside, list_files(aside)))

    write_directory(target, write)


def list_files(directory: Path) -> list[str]:
    """All files below a directory, by relative path."""
    return [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]


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

    from bov_lightning.checkpoint.placement import place
    from bov_lightning.model.transformer import Transformer

    if is_export(Path(path)):
        from bov_lightning.interop.hf_export import load_export

        return load_export(Path(path), device, dtype or torch.float32, bank_device)
    checkpoint = find_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(read_config(checkpoint))
    load_weights(model, read_weights(checkpoint), checkpoint)
    files = list((checkpoint / WEIGHTS).glob("*.safetensors"))
    # Tables written by several ranks lie in pieces, which cannot be mapped.
    whole = files if len(files) == 1 else []
    place(model, device, dtype or torch.float32, bank_device, whole)
    return model.eval(), load_tokenizer(checkpoint)


def load_tokenizer(checkpoint: Path) -> Any:
    """The checkpoint's tokenizer as a ``transformers`` fast tokenizer; None where it has none."""
    if not (checkpoint / TOKENIZER).is_dir():
        return None
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(checkpoint / TOKENIZER)
