"""Reads exports, as `transformers` may have saved them again; runs none of their code."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from bov_lightning.checkpoint.directory import is_export
from bov_lightning.checkpoint.placement import place
from bov_lightning.checkpoint.reading import load_weights
from bov_lightning.checkpoint.writing import config_yaml, write_checkpoint
from bov_lightning.errors import UserError
from bov_lightning.files import refuse_filled
from bov_lightning.interop.hf_model import (
    MODULE,
    BoVConfig,
    BoVForCausalLM,
    BoVModel,
    BoVPreTrainedModel,
)
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.counting import meta_model
from bov_lightning.model.lookup import source_class
from bov_lightning.model.transformer import Transformer
from data_modules.tokenizer import (
    own_settings,
    stored_tokenizer,
    transformers_tokenizer,
    without_template,
    write_tokenizer,
)

WEIGHTS = "model.safetensors"


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
        for name, tensor in found.items():
            if (own := name.removeprefix("model.")) in weights:
                raise UserError(
                    f"{directory} holds {own} twice, the second time in {file.name}: files of an "
                    "older export lie beside it"
                )
            weights[own] = tensor
    return shape, weights


def load_export(
    directory: Path, device: str | torch.device, dtype: torch.dtype, bank_device: str | None = None
) -> tuple[Transformer, Any]:
    """The model of an export, in eval mode, and its tokenizer or None; see `bov_lightning.load`."""
    shape, weights = read_export(directory)
    model = meta_model(shape.transformer_config())
    load_weights(model, weights, directory)
    place(model, device, dtype, bank_device, weight_files(directory), "model.")
    tokenizer = None
    if (directory / "tokenizer.json").is_file():
        tokenizer = transformers_tokenizer(directory)
    return model.eval(), tokenizer


def import_hf(directory: Path, output: Path) -> TransformerConfig:
    """Writes an export, as `transformers` may have saved it again, as a checkpoint of ours."""
    if not is_export(directory):
        raise UserError(f"{directory} is no export: its config.json names no model_type bov")
    refuse_filled(output)
    stored, weights = read_export(directory)
    shape = stored.transformer_config()
    load_weights(meta_model(shape), weights, directory)
    weights = {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = None
        if (directory / "tokenizer.json").is_file():
            tokenizer = Path(folder)
            found, names = stored_tokenizer(directory)
            write_tokenizer(without_template(found), names, tokenizer, own_settings(directory))
            if (directory / "generation_config.json").is_file():
                shutil.copyfile(
                    directory / "generation_config.json", tokenizer / "generation_config.json"
                )
        step = int(getattr(stored, "training_step", 0))
        write_checkpoint(output, step, weights, config_yaml(shape), tokenizer=tokenizer)
    return shape


def register() -> None:
    """Has the auto classes read exports without remote code, and write them whole."""
    AutoConfig.register(BoVConfig.model_type, BoVConfig, exist_ok=True)
    AutoModel.register(BoVConfig, BoVModel, exist_ok=True)
    AutoModelForCausalLM.register(BoVConfig, BoVForCausalLM, exist_ok=True)
    BoVPreTrainedModel.write_code = staticmethod(write_modelling_file)


def write_modelling_file(directory: Path, config: BoVConfig) -> None:
    """The code of a model as one file beside its weights."""
    # It looks at the kernels too, whose compiler takes seconds to import.
    from bov_lightning.interop.hf_source import modelling_source

    code = modelling_source(source_class(config.transformer_config().value.source))
    (directory / f"{MODULE}.py").write_text(code, encoding="utf-8")
