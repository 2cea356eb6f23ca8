"""What a probe has found so far, so that one that is killed goes on."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bov_lightning.files import remove, write_directory, write_file

ENTRIES, TENSORS = "state.json", "tensors.safetensors"


class State:
    """Named results in a directory, each complete or absent.

    Args:
        directory: where they lie; None keeps them in memory alone.
        fingerprint: of model, text and settings; what another probe has left is removed.
    """

    def __init__(self, directory: Path | None, fingerprint: str):
        self.directory = directory
        self.entries: dict[str, Any] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        found = self._read()
        if found.get("fingerprint") == fingerprint:
            self.entries = found
            return
        if directory is not None:
            for path in directory.glob("*.tensors"):
                remove(path)
        # Before any tensors, which are of this probe from here on.
        self.put(fingerprint=fingerprint)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads((self.directory / ENTRIES).read_text(encoding="utf-8"))
        except (AttributeError, TypeError, OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def get(self, name: str, default: Any = None) -> Any:
        """What was put under a name."""
        return self.entries.get(name, default)

    def put(self, **entries: Any) -> None:
        """Keeps what JSON can hold."""
        self.entries |= entries
        if self.directory is not None:
            write_file(self.directory / ENTRIES, json.dumps(self.entries))

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """What was kept under a name; None where nothing whole is."""
        if self.directory is None:
            return self._tensors.get(name)
        try:
            return load_file(self.directory / f"{name}.tensors" / TENSORS)
        except (OSError, SafetensorError):
            return None

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors."""
        if self.directory is None:
            self._tensors[name] = tensors
            return
        target = self.directory / f"{name}.tensors"
        write_directory(target, lambda folder: save_file(tensors, folder / TENSORS))

    def drop(self, name: str) -> None:
        """Forgets tensors."""
        self._tensors.pop(name, None)
        if self.directory is not None:
            remove(self.directory / f"{name}.tensors")


def digest_of(tensors: dict[str, Tensor]) -> str:
    """Changes when weights do: of names, shapes and some numbers of each."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // 4096)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(flat[::step].to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()
