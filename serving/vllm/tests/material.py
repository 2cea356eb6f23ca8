"""Small exports of every value source, with weights that let no path hide, and prompts."""

import sys
from pathlib import Path

import torch
import yaml
from conftest import REPOSITORY
from safetensors.torch import save_file

from bov_lightning.interop.hf_export import hf_config
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.transformer import Transformer
from bov_lightning.recipe.overlays import import_source

sys.path.append(str(REPOSITORY / "examples"))

PATHS = {
    path.stem: path
    for path in (
        *sorted((REPOSITORY / "recipes" / "values").glob("*.yaml")),
        *sorted((REPOSITORY / "examples").glob("*.yaml")),
    )
    if path.stem != "wide"
}
"""Without the control, whose values are the standard ones."""

MORE = {
    "ngram_bank_frequent": {"source": "ngram_bank", "layers": "last_third", "coefficient": 0.8,
                            "source_args": {"n_row": 600, "reach": 3, "factor": 1.7,
                                            "frequent": 300}},
}  # fmt: skip
"""Value sections of no overlay: tetragrams, some of which have rows of their own."""

SHAPE = {"n_layer": 6, "n_head": 4, "n_kv_head": 2, "d_model": 128, "vocab_size": 190,
         "sequence_len": 128}  # fmt: skip
"""Windows of 128 tokens, contexts of up to 1,280."""


def value_of(overlay: str) -> ValueConfig:
    """The value section of an overlay, whose class is imported."""
    if overlay in MORE:
        return ValueConfig(**MORE[overlay])
    data = yaml.safe_load(PATHS[overlay].read_text(encoding="utf-8"))
    import_source(data, overlay)
    return ValueConfig(**data["model"]["config"]["value"])


@torch.no_grad()
def make_model(overlay: str, pattern: str = "L", **shape) -> Transformer:
    """Zero-initialised output projections would hide almost any mistake, and so would no smear."""
    shape = SHAPE | {"window_pattern": pattern} | shape
    model = Transformer(TransformerConfig(**shape, value=value_of(overlay))).eval()
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if name.endswith("output.weight"):
            p.normal_(0, 0.1, generator=generator)
        elif name == "head.weight":
            p.normal_(0, 0.3, generator=generator)
        elif name.endswith("coefficient"):
            p.add_(torch.empty_like(p).uniform_(-0.2, 0.2, generator=generator))
        elif name.endswith("table"):
            # Rows of n-grams start at zero.
            p[model.config.padded_vocab_size :].normal_(0, 1, generator=generator)
    model.smear.strength.fill_(0.8)
    if model.lookup_source.learns_from:
        # Of the prompts that it will be asked: others' n-grams would not be found in them.
        model.learn(torch.tensor([ids[:600] for ids in make_prompts() if len(ids) > 600]))
    return model


def write_export(model: Transformer, directory: Path, **more) -> Path:
    """What `bov export` writes for vLLM, without tokenizer."""
    hf_config(model.config, dtype=torch.float32, **more).save_pretrained(directory)
    weights = {f"model.{name}": t.contiguous() for name, t in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def make_prompts(vocab_size: int = SHAPE["vocab_size"]) -> list[list[int]]:
    """Twelve, of 1 to 1,000 tokens: around ends of blocks of 32, and three that share 600.

    Two of these come first, so that the one is there while the other starts.
    """
    generator = torch.Generator().manual_seed(3)

    def draw(n: int) -> list[int]:
        return torch.randint(0, vocab_size, (n,), generator=generator).tolist()

    prefix = draw(600)
    ragged = [draw(n) for n in (1, 2, 31, 32, 33, 128, 161, 450, 1000)]
    return [prefix + draw(1), prefix + draw(40), *ragged, prefix + draw(200)]
