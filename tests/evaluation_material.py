"""Small models for the tests of evaluation, and the plain loop that they are checked against."""

import importlib.util
import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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


def worker(rank: int, world: int, port: int, folder: str, action, *arguments) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = action(rank, world, *arguments)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads may abort an interpreter that ends while they do; everything is written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def on_ranks(world: int, folder: Path, action, *arguments) -> list[dict]:
    """What the action returns on every rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (world, port, str(folder), action, *arguments), nprocs=world)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
