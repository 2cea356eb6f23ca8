"""Small models of every value variant, with weights that let no path hide."""

import pytest
import torch
import yaml
from conftest import REPOSITORY

from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.transformer import Transformer

OVERLAYS = {
    path.stem: yaml.safe_load(path.read_text())["model"]["config"]["value"]
    for path in sorted((REPOSITORY / "recipes" / "values").glob("*.yaml"))
}
SMALL = {"n_layer": 6, "n_head": 4, "n_kv_head": 2, "d_model": 48, "vocab_size": 70}


def make_model(value: dict | ValueConfig, seed: int = 0, **shape) -> Transformer:
    value = ValueConfig(**value) if isinstance(value, dict) else value
    shape = {"sequence_len": 512, "window_pattern": "SSSL"} | SMALL | shape
    return Transformer(TransformerConfig(**shape, value=value), seed).eval()


@torch.no_grad()
def perturb(model: Transformer, smear: float) -> Transformer:
    """Zero-initialised output projections would hide almost any mistake."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if name.endswith("output.weight"):
            p.normal_(0, 0.1, generator=generator)
        elif name == "head.weight":
            p.normal_(0, 0.3, generator=generator)
        elif name.endswith("coefficient"):
            p.add_(torch.empty_like(p).uniform_(-0.2, 0.2, generator=generator))
    model.smear.strength.fill_(smear)
    return model


def token_ids(n_token: int, n_row: int = 2, vocab_size: int = 70) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocab_size, (n_row, n_token), generator=generator)


def mostly_slow(names, fast) -> list:
    """Parameters of a test that runs for a few variants at once and for all in the slow suite."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
