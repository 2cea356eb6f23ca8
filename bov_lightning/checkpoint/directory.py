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
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from bov_lightning.errors import UserError
from bov_lightning.version import __version__

if TYPE_CHECKING:
    pass

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


def read_marker(checkpoint: Path) -> dict:
    """Step and version of a checkpoint."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text())
        return {**marker, "step": int(marker["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / MARKER} cannot be read: {error}") from error


def list_files(directory: Path) -> list[str]:
    """All files below a directory, by relative path."""
    return [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
