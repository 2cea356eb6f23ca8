"""Checkpoints as `transformers` directories, with code and a card of their own."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from bov_lightning.checkpoint.directory import TOKENIZER, find_checkpoint, read_marker
from bov_lightning.checkpoint.reading import load_checkpoint, not_finite
from bov_lightning.errors import UserError
from bov_lightning.files import refuse_filled, write_directory
from bov_lightning.interop.hf_import import WEIGHTS, write_modelling_file
from bov_lightning.interop.hf_model import AUTO_MAP, BoVConfig
from bov_lightning.interop.hf_source import import_module
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.lookup import is_own, source_class
from bov_lightning.model.transformer import Transformer
from bov_lightning.run.directory import RunDirectory
from bov_lightning.version import __version__
from data_modules.tokenizer import own_settings, stored_tokenizer, write_tokenizer

LOGIT_TOLERANCE = 1e-5
"""How far an export's fp32 logits may be from its source's."""

CACHED_TOLERANCE = 1e-2
"""How far fp32 logits of a text that is fed in pieces may be from those of the whole: rounding is a
hundredth of it, what a wrong value does a hundred times as much."""


def hf_config(shape: TransformerConfig, **more: Any) -> BoVConfig:
    """The configuration of an export."""
    return BoVConfig(
        **asdict(shape),
        max_context=shape.max_context,
        architectures=["BoVForCausalLM"],
        auto_map=dict(AUTO_MAP),
        **more,
    )


def export(path: str | Path, output: Path, dtype: torch.dtype = torch.float32) -> float:
    """Writes a checkpoint as a `transformers` directory, complete or absent.

    Returns:
        The largest difference between its logits, as read back by the modelling file that lies in
        it, and the source's in the same dtype.

    Raises:
        UserError: no complete checkpoint, ``output`` not empty, weights that are not finite, or
            logits that differ.
    """
    from safetensors.torch import save_file

    refuse_filled(output)
    checkpoint = find_checkpoint(path)
    model, tokenizer = load_checkpoint(checkpoint, dtype=dtype)
    if found := not_finite(model.state_dict().items()):
        raise UserError(
            f"the weights of {checkpoint} are not finite: {found}; export another checkpoint"
        )
    _refuse_other_decoding(model, checkpoint)
    special, ends = {}, {}
    if tokenizer is not None and (start := tokenizer.bos_token_id) is not None:
        # A document ends where the next one starts, whatever else ends a text.
        own = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        special = {f"{kind}_token_id": start if i is None else i for kind, i in own.items()}
        special["bos_token_id"] = start
        if special["eos_token_id"] != start:
            ends = {"eos_token_id": [special["eos_token_id"], start]}
    step = read_marker(checkpoint)["step"]
    differences = []

    def write(aside: Path) -> None:
        config = hf_config(model.config, dtype=dtype, training_step=step, **special)
        config.save_pretrained(aside)
        GenerationConfig(**special | ends).save_pretrained(aside)
        write_modelling_file(aside, config)
        if tokenizer is not None:
            _write_tokenizer(checkpoint / TOKENIZER, aside)
            kept = checkpoint / TOKENIZER / "generation_config.json"
            if kept.is_file():
                # An import has kept all tokens that end a text.
                shutil.copyfile(kept, aside / kept.name)
        weights = {f"model.{name}": t.contiguous() for name, t in model.state_dict().items()}
        save_file(weights, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / "README.md").write_text(model_card(model, checkpoint, step), encoding="utf-8")
        differences.append(_difference(model, aside))
        if not differences[0] <= LOGIT_TOLERANCE:
            raise UserError(
                f"the export of {checkpoint} computes other logits, off by {differences[0]:.2g}: "
                "nothing was written; please report this"
            )

    write_directory(output, write)
    return differences[0]


@torch.inference_mode()
def _refuse_other_decoding(model: Transformer, checkpoint: Path) -> None:
    """Refuses a value source that decodes other values than it trains with."""
    source = source_class(model.config.value.source)
    if model.head.weight.dtype != torch.float32:
        if not is_own(source):
            return
        model, _ = load_checkpoint(checkpoint, dtype=torch.float32)
    ids = _random_ids(model)
    n_token = ids.shape[1]
    half = n_token // 2
    pieces = [n for n in (half, 1, 1, n_token - half - 2) if n > 0]
    cache = model.new_cache(*ids.shape)
    cached = torch.cat([model(x, cache=cache) for x in ids.split(pieces, dim=1)], dim=1)
    if not (off := float((cached - model(ids)).abs().max())) <= CACHED_TOLERANCE:
        raise UserError(
            f"{checkpoint} decodes other logits than it was trained for, off by {off:.2g}: its "
            f"value source {model.config.value.source} looks at more than decoding keeps"
        )


def _random_ids(model: Transformer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (2, min(2 * model.config.sequence_len, 256))
    return torch.randint(0, model.config.vocab_size, size, generator=generator)


@torch.inference_mode()
def _difference(model: Transformer, directory: Path) -> float:
    """Largest difference of logits between a model and its export, whole and in cached pieces."""
    module = import_module(directory)
    found = module.BoVForCausalLM.from_pretrained(directory, dtype=model.head.weight.dtype).eval()
    ids = _random_ids(model)
    whole = (found(ids, use_cache=False).logits - model(ids)).abs().max()
    theirs = found(ids, use_cache=True).logits
    ours = model(ids, cache=model.new_cache(*ids.shape))
    return max(float(whole), float((theirs - ours).abs().max()))


def _write_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's files; it then puts the token that starts every document before a text."""
    tokenizer, names = stored_tokenizer(source)
    if (start := names.get("bos_token")) is not None:
        names = {"eos_token": start, "pad_token": start, **names}
    write_tokenizer(tokenizer, names, target, own_settings(source), starts_texts=True)


def model_card(model: Transformer, checkpoint: Path, step: int) -> str:
    """README.md of an export, with the figures of the run that the checkpoint lies in."""
    shape = model.config
    tables = sum(t.numel() for t in model.grouped_parameters().get("table", []))
    rows = [
        ("layers, width, heads / key-value heads", f"{shape.n_layer}, {shape.d_model}, "
         f"{shape.n_head} / {shape.n_kv_head}"),
        ("vocabulary", f"{shape.vocab_size:,}"),
        ("training rows", f"{shape.sequence_len:,} tokens, windows {shape.window_pattern}"),
        ("values", ", ".join(f"{key} {value}" for key, value in asdict(shape.value).items())),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("of these in value tables", f"{tables:,}"),
        ("training FLOPs per token", f"{model.flops_per_token():,}"),
        ("optimizer steps", f"{step:,}"),
        *_run_figures(checkpoint, step),
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    dtype = str(model.head.weight.dtype).removeprefix("torch.")
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [bank-of-values, bov-lightning]
---

# A transformer with values from: {shape.value.source}

Trained and exported with bov-lightning {__version__}. Layers whose values are a *Bank of Values*
(He, Liu, Huang, Zhang, 2026, arXiv 2606.02780) keep no value cache: token ids are enough.

| | |
| --- | --- |
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY", trust_remote_code=True)
tokens = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(tokens[0]))
```

Behind an API, with vLLM and bov-lightning's plugin for it, bov-vllm:

```bash
python -m vllm.entrypoints.openai.api_server --model DIRECTORY --dtype {dtype}
```

A base model: it continues text and follows no instructions. It repeats what its training text
says, wrong or harmful as that may be.
"""


def _run_figures(checkpoint: Path, step: int) -> list[tuple[str, str]]:
    """What the run directory around a checkpoint tells; nothing where there is none."""
    run, figures = RunDirectory(checkpoint.parent.parent), []
    try:
        facts = run.facts()
        figures += [(f"fingerprint: {k}", str(v)) for k, v in (facts.get("data") or {}).items()]
        figures.append(("git commit", str(facts.get("git_commit"))))
        measured = [row for row in run.metrics() if "val_bpb" in row and "step" in row]
        upto = [row["val_bpb"] for row in measured if int(float(row["step"])) <= step]
        if upto:
            figures.append(("validation bits per byte", f"{float(upto[-1]):.4f}"))
    except (UserError, ValueError, AttributeError):
        pass
    return figures
