"""The code of a value source of somebody's own, which is part of a run as its recipe is.

A run and its checkpoints hold a copy of each file, in ``code/``, which nobody imports, and run.json
the files' checksums, by which a run knows that it goes on with the code that it began with.
"""

import hashlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from bov_lightning.errors import UserError
from bov_lightning.model.lookup import is_own, source_class
from bov_lightning.run.directory import RunDirectory

FACT = "value_source"
"""The key in run.json: file and SHA-256 by module."""


OTHERS = {"builtins", "torch", *sys.stdlib_module_names}
"""Where classes come from that nobody edits."""


def files_of(source: str) -> dict[str, Path]:
    """The files of a value source by module: its own, and those of classes that it inherits from.

    Nothing for a source of the package, and for what lies in no file.
    """
    found = {}
    for cls in source_class(source).__mro__:
        if is_own(cls) and cls.__module__.partition(".")[0] not in OTHERS:
            try:
                found[cls.__module__] = Path(inspect.getfile(cls))
            except (OSError, TypeError):
                continue
    return {module: path for module, path in found.items() if path.is_file()}


def facts_of(source: str) -> dict[str, dict[str, str]]:
    """File and SHA-256 by module, as run.json holds them."""
    return {
        module: {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for module, path in files_of(source).items()
    }


def keep(source: str, run: RunDirectory) -> dict[str, Any]:
    """Copies the files into the run; what there is to say of them in run.json."""
    for module, path in files_of(source).items():
        run.code.mkdir(exist_ok=True)
        (run.code / f"{module}.py").write_bytes(path.read_bytes())
    found = facts_of(source)
    return {FACT: found} if found else {}


def refuse_other_code(run: RunDirectory, source: str) -> None:
    """Refuses to go on with a run whose value source has another code now.

    Raises:
        UserError: which file is another, and what to do.
    """
    try:
        known = json.loads(run.facts_file.read_text(encoding="utf-8")).get(FACT) or {}
    except (OSError, ValueError, AttributeError):
        return
    now = facts_of(source)
    for module, before in known.items():
        if module not in now or now[module]["sha256"] == before["sha256"]:
            continue
        raise UserError(
            f"{run} was trained with another {now[module]['file']}, of which it holds a copy "
            f"({run.code / module}.py): put that back, use another run.name, or, if both compute "
            "the same, --resume changed_code"
        )
