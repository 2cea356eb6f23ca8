"""Import of checkpoints that the paper's authors' code wrote (a fork of nanochat).

A directory holds ``model_NNNNNN.pt``, a state dict, and ``meta_NNNNNN.json``, whose
``model_config`` names the variant by boolean flags.
"""

import json
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from bov_lightning.checkpoint.reading import load_weights
from bov_lightning.checkpoint.writing import config_yaml, write_checkpoint
from bov_lightning.errors import UserError
from bov_lightning.files import refuse_filled
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.counting import meta_model
from bov_lightning.text import lines

SIZES = {
    "n_layer": "n_layer", "n_head": "n_head", "n_kv_head": "n_kv_head", "n_embd": "d_model",
    "vocab_size": "vocab_size", "sequence_len": "sequence_len", "window_pattern": "window_pattern",
}  # fmt: skip
SOURCE_FLAGS = {
    "v_from_value_emb": {"source": "bank"},
    "v_from_x0": {"source": "initial_embedding"},
    "v_from_v1": {"source": "first_layer"},
    "v_scale_learn": {"source": "context"},
    "add_init_v": {"source": "first_layer", "add_context": True},
    "add_init_res_v": {"source": "initial_embedding", "add_context": True},
    "add_init_value_emb": {"source": "bank", "add_context": True},
    "add_init_value_emb_nanogpt": {"source": "bank", "add_context": True, "coefficient": "gate"},
}
LAYER_FLAGS = {
    "on_every_layer": "every",
    "on_every_two_layers": "every_second",
    "on_second_half_layers": "second_half",
    "on_last_two_thirds_layers": "last_two_thirds",
}
OTHER_FLAGS = ("learn_init_coeffs", "value_emb_shared")
RENAMED = (
    (r"transformer\.wte\.weight", "embedding.weight"),
    (r"lm_head\.weight", "head.weight"),
    (r"smear_gate\.weight", "smear.gate"),
    (r"smear_lambda", "smear.strength"),
    (r"value_embeds\.(\d+)\.weight", r"blocks.\1.attention.value.source.table"),
    (r"transformer\.h\.(\d+)\.attn\.c_q\.weight", r"blocks.\1.attention.query.weight"),
    (r"transformer\.h\.(\d+)\.attn\.c_k\.weight", r"blocks.\1.attention.key.weight"),
    (r"transformer\.h\.(\d+)\.attn\.c_v\.weight", r"blocks.\1.attention.value.projection.weight"),
    (r"transformer\.h\.(\d+)\.attn\.c_proj\.weight", r"blocks.\1.attention.output.weight"),
    (r"transformer\.h\.(\d+)\.attn\.(?:gamma_v|beta_v)", r"blocks.\1.attention.value.coefficient"),
    (r"transformer\.h\.(\d+)\.attn\.alpha_v", r"blocks.\1.attention.value.context_coefficient"),
    (r"transformer\.h\.(\d+)\.attn\.ve_gate\.weight", r"blocks.\1.attention.value.gate.weight"),
    (r"transformer\.h\.(\d+)\.mlp\.c_fc\.weight", r"blocks.\1.mlp.input.weight"),
    (r"transformer\.h\.(\d+)\.mlp\.c_proj\.weight", r"blocks.\1.mlp.output.weight"),
)
"""Patterns of the authors' parameter names, and ours."""


def convert_config(model_config: dict) -> TransformerConfig:
    """Our configuration of the authors' ``model_config``; an unknown flag is a `UserError`."""
    sizes, flags = {}, []
    for key, value in model_config.items():
        if key in SIZES:
            sizes[SIZES[key]] = value
        elif key in SOURCE_FLAGS or key in LAYER_FLAGS or key in OTHER_FLAGS:
            flags += [key] if value else []
        elif value is not False:
            raise UserError(f"model_config.{key} is {value!r}, a flag that bov does not know")
    missing = [name for name, ours in SIZES.items() if ours not in sizes]
    if missing:
        raise UserError(f"model_config has no {missing[0]}")

    sources = [flag for flag in flags if flag in SOURCE_FLAGS]
    layer_sets = [flag for flag in flags if flag in LAYER_FLAGS]
    for chosen in (sources, layer_sets):
        if len(chosen) > 1:
            raise UserError(f"model_config sets both {chosen[0]} and {chosen[1]}")
    if not sources:
        if flags:
            raise UserError(
                f"model_config sets {flags[0]}, but no flag that chooses a value source"
            )
        return TransformerConfig(**sizes)
    value = dict(SOURCE_FLAGS[sources[0]])
    fixed = 0.5 if value.get("add_context") else 1.0
    value.setdefault("coefficient", "learned" if "learn_init_coeffs" in flags else fixed)
    value["layers"] = LAYER_FLAGS[layer_sets[0]] if layer_sets else "last_third"
    value["shared"] = "value_emb_shared" in flags
    return TransformerConfig(**sizes, value=ValueConfig(**value))


def convert_weights(state: dict[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Our names for the authors' state dict, without the W_V that they keep unused.

    A shared table is stored there once per target layer; it is taken from the first.
    """
    own = set(meta_model(config).state_dict())
    weights = {}
    for theirs, tensor in state.items():
        name = convert_name(theirs)
        unused_projection = name.endswith(".value.projection.weight")
        repeated_table = config.value.shared and name.endswith(".source.table")
        if name in own or not (unused_projection or repeated_table):
            weights[name] = tensor
    return weights


def convert_name(theirs: str) -> str:
    """Our name of one of the authors' parameters; a compiled model's prefix is dropped."""
    plain = theirs.removeprefix("_orig_mod.")
    for pattern, ours in RENAMED:
        if match := re.fullmatch(pattern, plain):
            return match.expand(ours)
    raise UserError(f"parameter {theirs} is not one of the authors' base model")


def import_nanochat(directory: Path, output: Path) -> TransformerConfig:
    """Writes the newest checkpoint in ``directory`` as one of ours; returns its configuration."""
    found = sorted(directory.glob("model_*.pt"))
    if not found:
        raise UserError(f"{directory} holds no model_NNNNNN.pt")
    refuse_filled(output)
    model_path = found[-1]
    meta_path = model_path.with_name(model_path.stem.replace("model_", "meta_") + ".json")
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        model_config = meta["model_config"]
        step = int(meta.get("step", 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{meta_path} cannot be read as a checkpoint's meta: {error!r}") from error
    try:
        config = convert_config(model_config)
    except (UserError, TypeError) as error:
        raise UserError(f"{meta_path}: {error}") from error
    try:
        state = torch.load(model_path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{model_path} cannot be read: {next(lines(str(error)), '')}") from error
    weights = convert_weights({name: t.float() for name, t in state.items()}, config)
    load_weights(meta_model(config), weights, model_path)
    write_checkpoint(output, step, weights, config_yaml(config))
    return config
