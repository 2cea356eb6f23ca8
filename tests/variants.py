"""Small models of every value variant, with weights that let no path hide.

A variant is an overlay: those of the paper's rows, the example's, and those of your own that
BOV_OVERLAYS names (files, separated by commas), whose classes must be importable.
"""

import os
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from parity import NAMES

from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.lookup import is_own
from bov_lightning.model.transformer import Transformer
from bov_lightning.recipe.overlays import import_source

VALUES = sorted(
    path for path in (REPOSITORY / "recipes" / "values").glob("*.yaml") if path.stem != "wide"
)
"""Without the control, whose values are the standard ones."""
PAPER = [path for path in VALUES if path.stem in NAMES]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.yaml"))
OWN = [Path(name) for name in filter(None, os.environ.get("BOV_OVERLAYS", "").split(","))]
PATHS = {path.stem: path for path in (*VALUES, *EXAMPLES, *OWN)}
OUTSIDE = [path.stem for path in (*EXAMPLES, *OWN)]
"""Variants whose class is not in the package: what the slow suite does for all is done for them."""


def read_overlay(path: Path) -> dict:
    overlay = yaml.safe_load(path.read_text())
    import_source(overlay, str(path))
    value = overlay["model"]["config"]["value"]
    args = value.get("source_args", {})
    if "n_row" in args:  # tables as small as the models
        args["n_row"] = 101
    return value


OVERLAYS = {name: read_overlay(path) for name, path in PATHS.items()}
KINDS = {"standard", "bov", "bov_add_context", "first_layer_every", "initial_embedding",
         "value_embedding_gated", "key", "layer_third", "ngram_bank"}  # fmt: skip
"""Variants of which each goes another way through the code: one per source, sums and gates."""
WAYS = [
    name for name in OVERLAYS
    if name in {
        *KINDS, "bov_shared_table", "bov_per_channel", "bov_every_layer",
        "value_embedding_gated_row", "context_plus_first_layer_fixed",
        "context_plus_initial_embedding", "ngram_bank_position", *OUTSIDE,
    }
]  # fmt: skip
"""Variants that together go every way: what costs seconds is done for these. The others put
together what these have, which `test_every_variant_goes_ways_that_are_tried` holds."""
SMALL = {"n_layer": 6, "n_head": 4, "n_kv_head": 2, "d_model": 48, "vocab_size": 70}


def make_model(value: dict | ValueConfig, seed: int = 0, **shape) -> Transformer:
    value = ValueConfig(**value) if isinstance(value, dict) else value
    shape = {"sequence_len": 512, "window_pattern": "SSSL"} | SMALL | shape
    return Transformer(TransformerConfig(**shape, value=value), seed).eval()


@torch.no_grad()
def perturb(model: Transformer, smear: float) -> Transformer:
    """Zero-initialised output projections would hide almost any mistake, and so would rows of a
    value source that all start alike."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if name.endswith("output.weight"):
            p.normal_(0, 0.1, generator=generator)
        elif name == "head.weight":
            p.normal_(0, 0.3, generator=generator)
        elif name.endswith("coefficient"):
            p.add_(torch.empty_like(p).uniform_(-0.2, 0.2, generator=generator))
        elif ".value.source." in name:
            own = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.empty_like(p).normal_(0, 0.5, generator=own)
            is_alike = (p == p[..., :1]).all(-1, keepdim=True)
            source = model.get_submodule(name.partition(".source.")[0]).source
            p.add_(noise if is_own(type(source)) else noise * is_alike)
    model.smear.strength.fill_(smear)
    return model


def token_ids(n_token: int, n_row: int = 2, vocab_size: int = 70) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocab_size, (n_row, n_token), generator=generator)


def mostly_slow(names, fast, outside: bool = True) -> list:
    """Parameters of a test that runs for a few variants at once and for all in the slow suite.

    ``outside``: those whose class is not in the package are among the few.
    """
    fast = {*fast, *(OUTSIDE if outside else ())}
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
