"""Small models for the tests of evaluation, and the plain loop that they are checked against."""

import importlib.util
import sys

import torch
from conftest import REPOSITORY
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 300
SMALL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 48, "d_model": 48, "n_embd": 48, "n_inner": 64,
    "intermediate_size": 64, "ffn_dim": 64, "decoder_ffn_dim": 64, "num_hidden_layers": 2,
    "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "num_attention_heads": 4,
    "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4, "head_dim": 12,
    "num_key_value_heads": 2, "word_embed_proj_dim": 48, "rotary_dim": 4, "dff": 64,
    "max_position_embeddings": 96, "n_positions": 96, "max_seq_len": 96, "is_decoder": True,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
"""What configurations call the same few numbers; each takes those that it knows."""


def make_llama(**shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 64, "bos_token_id": 0,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 2048,
        "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | shape)).eval()


def tiny(kind: str, more: dict) -> torch.nn.Module:
    """A model with random weights, large enough that every mistake shows."""
    plain = AutoConfig.for_model(kind)
    known = {*plain.to_dict(), *plain.attribute_map}
    config = AutoConfig.for_model(kind, **{k: v for k, v in SMALL.items() if k in known} | more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def plain_row(*args):
    """The plain loop's row of benchmarks/core.py, which is written from the protocol alone."""
    if "benchmark_core" not in sys.modules:
        path = REPOSITORY / "benchmarks" / "core.py"
        spec = importlib.util.spec_from_file_location("benchmark_core", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["benchmark_core"] = module
        spec.loader.exec_module(module)
    return sys.modules["benchmark_core"].plain_row(*args)
