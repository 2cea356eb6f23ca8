"""Checkpoints as `transformers` directories and back; importing this registers the classes.

With it imported, `AutoModelForCausalLM.from_pretrained` reads exports without remote code.
"""

import ast
import importlib.util
import inspect
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from bov_lightning import __version__, errors
from bov_lightning.checkpoint.directory import (
    TOKENIZER,
    find_checkpoint,
    is_export,
    load,
    load_weights,
    read_marker,
    write_checkpoint,
)
from bov_lightning.checkpoint.placement import place
from bov_lightning.errors import UserError
from bov_lightning.files import write_directory
from bov_lightning.interop import hf_model
from bov_lightning.interop.hf_model import BoVConfig, BoVForCausalLM
from bov_lightning.interop.nanochat import config_yaml
from bov_lightning.model import (
    attention,
    cache,
    config,
    decode,
    kernels,
    layers,
    loss,
    matmul,
    offload,
    transformer,
    values,
)
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.transformer import Transformer
from bov_lightning.model.values import BankOfValues, ValueSource, class_path, source_class

MODULE = "modeling_bov"
WEIGHTS = "model.safetensors"
PARTS = (
    errors, matmul, layers, config, attention, kernels, decode, values, loss, offload, cache,
    transformer, hf_model,
)  # fmt: skip
"""The files of the network, each after those that it imports."""

SELF_CONTAINED = {"torch", "transformers", *sys.stdlib_module_names}
"""What the modelling file of an export may import."""

LOGIT_TOLERANCE = 1e-5
"""How far an export's fp32 logits may be from its source's."""

AutoConfig.register(BoVConfig.model_type, BoVConfig, exist_ok=True)
AutoModelForCausalLM.register(BoVConfig, BoVForCausalLM, exist_ok=True)


def _is_own(node: ast.AST) -> bool:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return any(name.partition(".")[0] == "bov_lightning" for name in names)


def _dropped(tree: ast.Module) -> Iterator[ast.AST]:
    """What a part of the assembled file leaves out: docstring, imports, own imports anywhere."""
    if ast.get_docstring(tree) is not None:
        yield tree.body[0]
    yield from (node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    for node in ast.walk(tree):
        type_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if type_only or (isinstance(node, ast.Import | ast.ImportFrom) and _is_own(node)):
            yield node


def _parts(source: type[ValueSource]) -> Iterator[tuple[str, str]]:
    """(name, source code) of each file; a value source of somebody's own is one of them."""
    for part in PARTS:
        yield part.__name__, inspect.getsource(part)
        if part is values and source.__module__ != values.__name__:
            yield source.__module__, _own_source(source)


def _own_source(source: type[ValueSource]) -> str:
    """The file of a value source from outside of the package, checked to fit into an export."""
    try:
        code = inspect.getsource(sys.modules[source.__module__])
    except (OSError, TypeError):
        raise UserError(
            f"{class_path(source)} cannot be exported: it is in no file; make it a module"
        ) from None
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        outside = {name.partition(".")[0] for name in names} - SELF_CONTAINED - {"bov_lightning"}
        renamed = _is_own(node) and (
            isinstance(node, ast.Import) or any(alias.asname for alias in node.names)
        )
        if outside or renamed or getattr(node, "level", 0):
            raise UserError(
                f"{class_path(source)} cannot be exported: an export holds all of its code in one "
                f"file, so its module cannot have the line `{ast.unparse(node)}`; torch, the "
                "standard library and `from bov_lightning... import NAME` are possible"
            )
    # Known by its path there too, in whatever file it then is.
    return f"{code}\n\n{source.__qualname__}.__module__ = {source.__module__!r}\n"


def modelling_source(source: type[ValueSource] = BankOfValues) -> str:
    """The network and its `transformers` classes as one module that imports only torch and
    transformers, made of this package's own files, and of that of ``source`` if it is another."""
    imports: set[str] = set()
    bodies = []
    for name, code in _parts(source):
        tree, lines = ast.parse(code), code.splitlines()
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom) and not _is_own(node):
                imports.add(ast.unparse(node))
        for node in _dropped(tree):
            for line in range(node.lineno - 1, node.end_lineno):
                lines[line] = None
        body = "\n".join(line for line in lines if line is not None).strip()
        title = (ast.get_docstring(tree) or "").partition("\n")[0]
        bodies.append(f"# {name}: {title}\n\n{body}")
    head = (
        f'"""Transformer with Bank of Values (arXiv 2606.02780), made by bov-lightning '
        f'{__version__}. Apache-2.0."""'
    )
    return "\n\n\n".join([head, "\n".join(sorted(imports)), *bodies]) + "\n"


def import_module(directory: Path) -> ModuleType:
    """The modelling file of an export that this process has just written."""
    name = f"_bov_export_{abs(hash(directory))}"
    spec = importlib.util.spec_from_file_location(name, directory / f"{MODULE}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def hf_config(shape: TransformerConfig, **more: Any) -> BoVConfig:
    """The configuration of an export."""
    return BoVConfig(
        **asdict(shape),
        max_context=shape.max_context,
        architectures=["BoVForCausalLM"],
        auto_map={
            "AutoConfig": f"{MODULE}.BoVConfig",
            "AutoModelForCausalLM": f"{MODULE}.BoVForCausalLM",
        },
        **more,
    )


def export(path: str | Path, output: Path, dtype: torch.dtype = torch.float32) -> float:
    """Writes a checkpoint as a `transformers` directory, complete or absent.

    Returns:
        The largest difference between its logits, as read back by the modelling file that lies in
        it, and the source's in the same dtype.

    Raises:
        UserError: no complete checkpoint, ``output`` not empty, or logits that differ.
    """
    from safetensors.torch import save_file

    refuse_filled(output)
    checkpoint = find_checkpoint(path)
    model, tokenizer = load(checkpoint, dtype=dtype)
    special = {}
    if tokenizer is not None and tokenizer.bos_token_id is not None:
        special = {f"{kind}_token_id": tokenizer.bos_token_id for kind in ("bos", "eos", "pad")}
    step = read_marker(checkpoint)["step"]
    differences = []

    def write(aside: Path) -> None:
        hf_config(model.config, dtype=dtype, training_step=step, **special).save_pretrained(aside)
        GenerationConfig(**special).save_pretrained(aside)
        source = source_class(model.config.value.source)
        (aside / f"{MODULE}.py").write_text(modelling_source(source), encoding="utf-8")
        if tokenizer is not None:
            _write_tokenizer(checkpoint / TOKENIZER, aside, tokenizer.bos_token)
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


def refuse_filled(output: Path) -> None:
    """Raises a `UserError` where ``output`` holds something."""
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise UserError(f"{output} exists and is not empty: choose another --output")


@torch.inference_mode()
def _difference(model: Transformer, directory: Path) -> float:
    """Largest difference of logits between a model and its export, whole and in cached pieces."""
    module = import_module(directory)
    found = module.BoVForCausalLM.from_pretrained(directory, dtype=model.head.weight.dtype).eval()
    generator = torch.Generator().manual_seed(0)
    size = (2, min(2 * model.config.sequence_len, 256))
    ids = torch.randint(0, model.config.vocab_size, size, generator=generator)
    whole = (found(ids).logits - model(ids)).abs().max()
    theirs = found(ids, use_cache=True).logits
    ours = model(ids, cache=model.new_cache(*size))
    return max(float(whole), float((theirs - ours).abs().max()))


def _write_tokenizer(source: Path, target: Path, start: str | None) -> None:
    """The tokenizer's files; it then puts the token that starts every document before a text."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
    path = target / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    if start is not None:
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A $B",
            special_tokens=[(start, tokenizer.token_to_id(start))],
        )  # fmt: skip
        tokenizer.save(str(target / "tokenizer.json"))
        # A document ends where the next one starts.
        settings |= {"eos_token": start, "pad_token": start}
    path.write_text(json.dumps(settings, indent=1) + "\n")


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

A base model: it continues text and follows no instructions. It repeats what its training text
says, wrong or harmful as that may be.
"""


def _run_figures(checkpoint: Path, step: int) -> list[tuple[str, str]]:
    """What the run directory around a checkpoint tells; nothing where there is none."""
    import csv

    run, figures = checkpoint.parent.parent, []
    try:
        content = json.loads((run / "run.json").read_text())
        prints = content.get("data") or {}
        figures += [(f"fingerprint: {name}", str(value)) for name, value in prints.items()]
        figures.append(("git commit", str(content.get("git_commit"))))
    except (OSError, ValueError, AttributeError):
        return []
    try:
        with open(run / "metrics.csv", newline="") as file:
            measured = [row for row in csv.DictReader(file) if row.get("val_bpb")]
        upto = [row for row in measured if int(float(row.get("step") or 0)) <= step]
        if upto:
            figures.append(("validation bits per byte", f"{float(upto[-1]['val_bpb']):.4f}"))
    except (OSError, ValueError):
        pass
    return figures


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of an export; `transformers` may have saved several."""
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{directory} holds no {WEIGHTS}")
    return files


def read_export(directory: Path) -> tuple[BoVConfig, dict[str, Tensor]]:
    """Configuration and weights of an export, by our names; runs none of its code."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        shape = BoVConfig(**json.loads((directory / "config.json").read_text()))
        shape.transformer_config()
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{directory / 'config.json'} cannot be read: {error}") from error
    weights: dict[str, Tensor] = {}
    for file in weight_files(directory):
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        weights |= {name.removeprefix("model."): tensor for name, tensor in found.items()}
    return shape, weights


def load_export(
    directory: Path, device: str | torch.device, dtype: torch.dtype, bank_device: str | None = None
) -> tuple[Transformer, Any]:
    """The model of an export, in eval mode, and its tokenizer or None; see `bov_lightning.load`."""
    shape, weights = read_export(directory)
    with torch.device("meta"):
        model = Transformer(shape.transformer_config())
    load_weights(model, weights, directory)
    place(model, device, dtype, bank_device, weight_files(directory), "model.")
    tokenizer = None
    if (directory / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    return model.eval(), tokenizer


def import_hf(directory: Path, output: Path) -> TransformerConfig:
    """Writes an export, as `transformers` may have saved it again, as a checkpoint of ours."""
    if not is_export(directory):
        raise UserError(f"{directory} is no export: its config.json names no model_type bov")
    refuse_filled(output)
    stored, weights = read_export(directory)
    shape = stored.transformer_config()
    with torch.device("meta"):
        model = Transformer(shape)
    load_weights(model, weights, directory)
    weights = {name: tensor.float() for name, tensor in weights.items()}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = None
        if (directory / "tokenizer.json").is_file():
            tokenizer = Path(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                if (directory / name).is_file():
                    shutil.copyfile(directory / name, tokenizer / name)
        step = int(getattr(stored, "training_step", 0))
        write_checkpoint(output, step, weights, config_yaml(shape), tokenizer=tokenizer)
    return shape
