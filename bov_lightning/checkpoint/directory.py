"""Checkpoint directories: written whole or not at all, read without running anybody's code.

checkpoints/step-00000100/
    config.yaml          the resolved recipe (an import's: the model section alone)
    tokenizer/           a transformers tokenizer, where there is one
    code/                the files of a value source of somebody's own, to be read by people
    weights/             safetensors, one file per rank that wrote; any number of ranks reads them
    optimizer/           the same for optimizer state and random states (absent in an import)
    training.pt          schedule, loops, data position (absent in an import)
    checkpoint.json      step, version, and size and checksum of every other file; written last, so
                         its presence means complete
"""

import json
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from bov_lightning.console import say
from bov_lightning.errors import UserError
from bov_lightning.files import remove
from bov_lightning.version import __version__

MARKER = "checkpoint.json"
WEIGHTS = "weights"
OPTIMIZER = "optimizer"
TRAINING = "training.pt"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer"
CODE = "code"


def is_export(directory: Path) -> bool:
    """Whether a directory is no checkpoint but a `transformers` export of one: see
    `bov_lightning.interop.hf_export`."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "bov"


def step_name(step: int) -> str:
    """The directory name of the checkpoint at ``step``."""
    return f"step-{step:08d}"


def problem(directory: Path) -> str | None:
    """Why the directory is no complete checkpoint, by names and sizes alone; None if it is one."""
    try:
        marker = read_marker(directory)
        if _is_step(directory) and marker["step"] != step_of(directory):
            return f"it holds step {marker['step']}: it was renamed"
        for name, facts in marker["files"].items():
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


def flaw(directory: Path) -> str | None:
    """Why the directory must not be used: `problem`, or else `damaged_file`; None if it may be.

    This is what a good checkpoint means to whatever resumes, deletes, evaluates or exports. Files
    are read to their end once: those that have not changed since are known.
    """
    if reason := problem(directory):
        return reason
    try:
        looks, known = _looks(directory), directory.absolute()
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    if _verified.get(known, (None,))[0] != looks:
        _verified[known] = looks, damaged_file(directory)
    return _verified[known][1]


def trust(directory: Path) -> None:
    """This process has just written the checkpoint, and taken the checksums from its files."""
    _verified[directory.absolute()] = _looks(directory), None


def _looks(directory: Path) -> tuple:
    """What changes when one of its files does."""
    names = sorted([MARKER, *read_marker(directory)["files"]])
    facts = [(directory / name).stat() for name in names]
    pairs = zip(names, facts, strict=True)
    return tuple((name, x.st_size, x.st_mtime_ns, x.st_ino) for name, x in pairs)


_verified: dict[Path, tuple[tuple, str | None]] = {}
"""What `flaw` has found in a directory whose files looked like that."""


def _is_step(directory: Path) -> bool:
    """Whether it is named as a run's checkpoints are; a copy may have any other name."""
    return re.fullmatch(r"step-\d{8,}", directory.name) is not None


def step_directories(run: Path) -> list[Path]:
    """What looks like a checkpoint of a run directory, complete or not, oldest first."""
    return sorted(filter(_is_step, (run / "checkpoints").glob("step-*")), key=step_of)


def good_checkpoints(run: Path) -> Iterator[Path]:
    """The checkpoints of a run without a `flaw`, newest first; each is read when its turn comes."""
    return (path for path in reversed(step_directories(run)) if flaw(path) is None)


def lost_checkpoints(run: Path) -> list[Path]:
    """What lies among a run's checkpoints and was one, whatever it is called or lacks now.

    What a job that was killed leaves behind begins with a dot, and is none.
    """
    try:
        found = sorted((run / "checkpoints").iterdir())
    except OSError:
        return []
    return [
        path for path in found
        if not path.name.startswith(".")
        and (path.name.startswith("step-") or (path / MARKER).exists())
    ]  # fmt: skip


def step_of(checkpoint: Path) -> int:
    """The step in the name of a run's checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def complete_checkpoints(run: Path) -> list[Path]:
    """All complete checkpoints of a run directory, oldest first."""
    return [path for path in step_directories(run) if is_complete(path)]


def prune(run: Path, keep_last: int, keep_every: int | None, written: int) -> None:
    """Deletes the complete checkpoints that are older than the ``keep_last`` newest good ones.

    Damaged ones do not count: the last good one would go because of them.

    Args:
        run: the run directory.
        keep_last: how many good ones to keep.
        keep_every: also keep those whose step is a multiple of this.
        written: the step that has just been written, which is kept whatever else is there.
    """
    kept = {step_of(path) for path in islice(good_checkpoints(run), keep_last)} | {written}
    for path in complete_checkpoints(run):
        step = step_of(path)
        if step < min(kept) and not (keep_every and step % keep_every == 0):
            # Renamed first: a half-deleted directory must not pass for a checkpoint.
            doomed = path.with_name(f".{path.name}.old")
            remove(doomed)
            remove(path.rename(doomed))


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
    """The checkpoint at ``path``: itself, or the newest good one of a run directory.

    Newer ones that are damaged are left out, which is said: a run is resumed from the same.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a run directory or a checkpoint")
    if (path / MARKER).exists():
        if reason := flaw(path):
            raise UserError(f"{path} is not usable: {reason}")
        return path
    reasons = []
    for found in reversed(step_directories(path)):
        if (reason := flaw(found)) is None:
            for line in reasons:
                say(line)
            return found
        reasons.append(f"skipped {found}: {reason}")
    if reasons:
        raise UserError(f"no checkpoint of {path} can be used ({'; '.join(reasons)})")
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
