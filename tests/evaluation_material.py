"""Small models for the tests of evaluation, and the plain loop that they are checked against."""

import importlib.util
import sys

import torch
from conftest import REPOSITORY
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 300


def make_llama(**shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 64, "bos_token_id": 0,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 2048,
        "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | shape)).eval()


def plain_row(*args):
    """The plain loop's row of benchmarks/core.py, which is written from the protocol alone."""
    if "benchmark_core" not in sys.modules:
        path = REPOSITORY / "benchmarks" / "core.py"
        spec = importlib.util.spec_from_file_location("benchmark_core", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["benchmark_core"] = module
        spec.loader.exec_module(module)
    return sys.modules["benchmark_core"].plain_row(*args)
