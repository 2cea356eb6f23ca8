"""The reference numbers of one variant, made by running the paper's authors' code."""

import copy
import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bov_lightning.inference.loading import load
from bov_lightning.interop.nanochat import convert_name, import_nanochat
from bov_lightning.model.transformer import Transformer

NAMES = (
    "standard", "bov", "bov_fixed", "bov_every_layer", "bov_second_half", "bov_last_two_thirds",
    "bov_every_second", "bov_shared_table", "bov_add_context", "value_embedding_gated",
    "context_scaled", "first_layer", "first_layer_fixed", "first_layer_every",
    "first_layer_every_second", "initial_embedding", "initial_embedding_fixed",
    "initial_embedding_every_second", "context_plus_first_layer", "context_plus_first_layer_fixed",
    "context_plus_initial_embedding", "context_plus_initial_embedding_fixed",
)  # fmt: skip


IMPORTED: dict[str, Transformer] = {}
"""Models by their names: each is imported once a process, and copied."""


@cache
def read_rows(shared: Path) -> dict:
    """parity.json."""
    return json.loads((shared / "parity" / "parity.json").read_text())


@dataclass
class ParityRow:
    """One variant's weights, inputs and expected outputs, in our parameter names."""

    shared: Path
    name: str

    @cached_property
    def numbers(self) -> dict:
        return read_rows(self.shared)["rows"][self.name]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.shared / "parity" / f"{self.name}.safetensors")

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below ``prefix``, by our names; a repeated shared table comes once."""
        theirs = {
            key.removeprefix(f"{prefix}."): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(f"{prefix}.")
        }
        return {convert_name(key): tensor for key, tensor in theirs.items()}

    def inputs_and_targets(self, i: int) -> tuple[Tensor, Tensor]:
        ids = self.tensors["ids"][i]
        return ids[:, :-1], ids[:, 1:]

    def imported_model(self, folder: Path) -> Transformer:
        """The model, through the importer, from files laid out as the authors' code lays them."""
        if self.name not in IMPORTED:
            IMPORTED[self.name] = self._import(folder)
        return copy.deepcopy(IMPORTED[self.name])

    def _import(self, folder: Path) -> Transformer:
        source, output = folder / "theirs", folder / "ours"
        source.mkdir()
        state = {
            key.removeprefix("state."): tensor
            for key, tensor in self.tensors.items()
            if key.startswith("state.")
        }
        torch.save(state, source / "model_000000.pt")
        (source / "meta_000000.json").write_text(json.dumps(self.numbers["meta"]))
        import_nanochat(source, output)
        model, tokenizer = load(output)
        assert tokenizer is None
        return model
