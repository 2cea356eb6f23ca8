"""Decoding: a bank against cached values, one layer and whole models, memory, and Llama.

    python benchmarks/decode.py [--context 1024 8192 32768 131072] [--batch 1 8] [--repeats 7]
    python benchmarks/decode.py --device cuda --dtype bfloat16 --batch 1 32

Everything that is compared runs in turns within this one process; medians. Token ids are drawn from
Zipf's distribution over the vocabulary, which is how often real tokens repeat. On a GPU a layer's
kernels are captured once and replayed, on keys and tables that its cache does not hold.
"""

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))

import harness
from harness import peak_memory_mb, report, side_by_side

from bov_lightning.inference.decoding import Decoding
from bov_lightning.inference.graph import StaticStep, StaticSteps
from bov_lightning.inference.sampling import Sampling
from bov_lightning.model.cache import Cache
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.counting import meta_model, with_standard_values
from bov_lightning.model.decode import attend_bank, attend_gathered, attend_values
from bov_lightning.model.ngrams import largest_prime, ngram_keys
from bov_lightning.model.transformer import Transformer

BOV = ValueConfig("bank", "last_third", "learned")
VOCAB = 32768
NGRAM_ROWS = largest_prime(2**16)


@dataclass(frozen=True, eq=False)
class Sizes:
    """What is decoded."""

    n_head: int = 12
    head_dim: int = 128
    """Of the layer."""
    model: TransformerConfig = TransformerConfig(12, 6, 6, 768, VOCAB, 2048, "SSSL", value=BOV)
    """The whole model: 135M."""
    large: TransformerConfig = TransformerConfig(24, 12, 12, 1536, VOCAB, 2048, "SSSL", value=BOV)
    """That whose memory is counted: 780M."""
    n_prompt: int = 2048
    n_new: int = 256
    at_least: float = 4.0
    """Seconds in which short actions are repeated."""


SMALL = TransformerConfig(3, 2, 2, 32, 256, 64, "L", value=BOV)
TOY = Sizes(2, 16, SMALL, SMALL, n_prompt=32, n_new=4, at_least=0)
COLD_BYTES = 2**28
"""Several times what a GPU's cache holds."""


def zipf_ids(n_row: int, n_token: int, n_vocab: int = VOCAB) -> torch.Tensor:
    """(B, T) token ids; rank r has probability proportional to 1/r."""
    generator = torch.Generator().manual_seed(0)
    weight = 1 / torch.arange(1, n_vocab + 1, dtype=torch.float32)
    ranks = torch.multinomial(weight, n_row * n_token, replacement=True, generator=generator)
    return torch.randperm(n_vocab, generator=generator)[ranks].view(n_row, n_token)


def waiting(action: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The action, and then what it has started on the device."""
    if device.type == "cpu":
        return action

    def run() -> None:
        action()
        torch.cuda.synchronize()

    return run


def captured(action: Callable[[], object]) -> Callable[[], object]:
    """The action's kernels as one CUDA graph: Python starts them more slowly than they run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        action()
        action()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def _captured_ones(actions: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The actions as graphs; one that waits for the device cannot be captured, and is left out."""
    graphs = {}
    for name, action in actions.items():
        try:
            graphs[name] = waiting(captured(action), torch.device("cuda"))
        except RuntimeError:
            traceback.print_exc()
    return graphs


def one_layer(
    batch: int, context: int, dtype: torch.dtype, repeats: int, sizes: Sizes, device: torch.device
) -> dict[str, float]:
    """Seconds of one layer's attention for one new token per row.

    On CUDA also ``bank_error``: the largest difference from gathering in fp32, for one row.
    """
    n_head, head_dim = sizes.n_head, sizes.head_dim
    # Every layer of a model has other keys and another table, which no cache holds any more.
    n_byte = batch * n_head * context * head_dim * dtype.itemsize
    n_layer = 1 if device.type == "cpu" else max(1, min(16, COLD_BYTES // n_byte))
    ids = zipf_ids(batch, context).to(device)
    tables = [
        torch.empty(VOCAB, n_head * head_dim, device=device, dtype=dtype).normal_()
        for _ in range(min(n_layer, 4))
    ]
    bigrams = ngram_keys(torch.stack((ids, ids.roll(1, dims=1)), dim=-1)) % NGRAM_ROWS + VOCAB
    row_ids = torch.cat((ids[..., None], bigrams), dim=-1)
    more_rows = torch.empty(NGRAM_ROWS, n_head * head_dim, device=device, dtype=dtype).normal_()
    wider = torch.cat((tables[0], more_rows))
    query = torch.randn(batch, n_head, 1, head_dim).to(device, dtype)
    key, value = (
        [
            torch.empty(batch, n_head, context, head_dim, device=device, dtype=dtype).normal_()
            for _ in range(n_layer)
        ]
        for _ in range(2)
    )

    def gather(i: int) -> None:
        rows = F.embedding(ids, tables[i % len(tables)]).view(batch, context, n_head, head_dim)
        F.scaled_dot_product_attention(query, key[i], rows.transpose(1, 2))

    ways = {
        "cached": lambda i: F.scaled_dot_product_attention(query, key[i], value[i]),
        "cached_ours": lambda i: attend_values(query, key[i], value[i], None),
        "gather": gather,
        "bank": lambda i: attend_bank(query, key[i], ids, tables[i % len(tables)], None),
        "ngram_bank": lambda i: attend_bank(query, key[i], row_ids, wider, None, (1.0, 1.0)),
    }

    def layers(way: Callable[[int], object]) -> None:
        for i in range(n_layer):
            way(i)

    actions = {name: partial(layers, way) for name, way in ways.items()}
    if device.type == "cuda":
        actions = _captured_ones(actions)
    seconds = side_by_side(actions, repeats, sizes.at_least)
    found = {name: value / n_layer for name, value in seconds.items()}
    if device.type == "cuda" and batch == 1:
        exact = (x.float() for x in (query, key[0]))
        expected = attend_gathered(*exact, ids, tables[0].float(), None)
        bank = attend_bank(query, key[0], ids, tables[0], None)
        found["bank_error"] = float((bank.float() - expected).abs().max())
    return found


@lru_cache(maxsize=2)
def made(sizes: Sizes, banks: bool, dtype: torch.dtype, device: torch.device) -> Transformer:
    """The whole model, with banks or standard values; to fill one takes seconds."""
    config = sizes.model if banks else with_standard_values(sizes.model)
    return Transformer(config).to(device, dtype).eval()


def filled(cache: Cache, n_token: int, n_vocab: int) -> Cache:
    """``cache`` as if its rows had seen so many random tokens."""
    cache.pretend(zipf_ids(cache.batch_size, n_token, n_vocab).to(cache.device))
    for store in cache.stores:
        store.kept.normal_()
    return cache


def whole_model(
    batch: int, context: int, dtype: torch.dtype, repeats: int, sizes: Sizes, device: torch.device
) -> dict[str, float]:
    """Seconds per token of the model with and without banks; on CUDA also without a graph."""
    actions = {}
    n_vocab = sizes.model.vocab_size
    for name, banks in {"bov": True, "standard": False}.items():
        model = made(sizes, banks, dtype, device)
        room = context + 2 * (max(repeats, 50) + 1)
        cache = filled(model.new_cache(batch, room), context, n_vocab)
        token = zipf_ids(batch, 1, n_vocab).to(device)
        plain = waiting(partial(model, token, cache=cache), device)
        if device.type == "cuda":
            actions[name] = waiting(partial(StaticStep(model, cache), token), device)
            actions[f"{name}_launched"] = plain
        else:
            actions[name] = plain
    return side_by_side(actions, repeats, sizes.at_least)


def against_llama(
    batch: int, dtype: torch.dtype, repeats: int, sizes: Sizes, device: torch.device
) -> dict[str, float]:
    """Seconds of models of one shape for a prompt and for the greedy tokens after it.

    On CUDA a step is captured once, in the turn that warms up; ``launched`` has no graph.
    Llama's MLP has three matrices: two thirds of the width give it as many parameters.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config, n_prompt, n_new = sizes.model, sizes.n_prompt, sizes.n_new
    shape = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, intermediate_size=8 * config.d_model // 3,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    llama = LlamaForCausalLM(shape).to(device, dtype).eval()
    ours = made(sizes, True, dtype, device)
    prompt = zipf_ids(batch, n_prompt, config.vocab_size).to(device)
    rows = prompt.tolist()

    def theirs(n: int) -> None:
        found = llama.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False
        )
        assert found.shape[1] == n_prompt + n

    cuda = device.type == "cuda"
    steps = StaticSteps(ours) if cuda else None

    def decode(n: int, static: StaticSteps | bool | None) -> None:
        decoding = Decoding(ours, rows, Sampling(n, temperature=0), n_prompt + n, static)
        while any(decoding.running):
            decoding.step()

    actions = {
        "llama": lambda: theirs(n_new),
        "ours": lambda: decode(n_new, steps),
        "llama_prompt": lambda: theirs(1),
        "ours_prompt": lambda: decode(1, steps),
    }
    if cuda:
        actions["launched"] = lambda: decode(n_new, False)
    waited = {name: waiting(action, device) for name, action in actions.items()}
    return side_by_side(waited, repeats, at_least=0)


def cache_bytes(context: int, config: TransformerConfig) -> dict[str, int]:
    """Bytes of the model's cache, of its tables, and of all keys and values, in bf16."""

    def tensors(config: TransformerConfig) -> int:
        blocks = meta_model(config).blocks
        cache = Cache(config, blocks, 1, context, torch.bfloat16, torch.device("cpu"))
        return cache.nbytes

    full = replace(with_standard_values(config), window_pattern="L")
    tables = sum(t.numel() for t in meta_model(config).grouped_parameters()["table"])
    return {
        "ours": tensors(config),
        "window_caches": tensors(with_standard_values(config)),
        "full_cache": tensors(full),
        "tables": 2 * tables,
    }


def ratios_of(seconds: dict[str, float]) -> dict[str, float]:
    """What the times that are there say."""
    found: dict[str, float] = {}
    for name, value in seconds.items():
        kind, _, rest = name.partition("_")
        if kind == "layer" and rest.endswith("bank"):
            dtype, batch, context, bank = rest.split("_", 3)
            suffix = "" if dtype == "float32" else f"_{dtype}"
            suffix += "" if batch == "b1" else f"_{batch}"
            for other in ("cached", "gather", "cached_ours"):
                theirs = seconds.get(f"layer_{dtype}_{batch}_{context}_{other}")
                if theirs is not None:
                    found[f"{bank}_vs_{other}_{context}{suffix}"] = value / theirs
        if kind == "model" and rest.endswith("_bov"):
            batch, context = rest.removesuffix("_bov").split("_")
            suffix = "" if batch == "b1" else f"_{batch}"
            theirs = seconds[f"model_{batch}_{context}_standard"]
            found[f"bov_vs_standard_{context}{suffix}"] = value / theirs
        if name.endswith("_llama"):
            run = name.removesuffix("_llama")
            suffix = "".join(f"_{part}" for part in run.split("_") if part != "float32")
            theirs = value - seconds[f"{name}_prompt"]
            ours = seconds[f"{run}_ours"] - seconds[f"{run}_ours_prompt"]
            found[f"vs_llama{suffix}"] = theirs / ours
            found[f"vs_llama{suffix}_with_prompt"] = value / seconds[f"{run}_ours"]
    return found


@torch.inference_mode()
def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192, 32768, 131072])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--llama-repeats", type=int, default=0, help="after a first; 0: once")
    parser.add_argument("--llama-batch", type=int, nargs="+", default=[1])
    parser.add_argument("--memory-gb", type=float, default=16, help="skip what needs more")
    parser.add_argument("--cpu-time", action="store_true", help="not wall-clock time")
    parser.add_argument("--toy", action="store_true", help="small models, to see that all runs")
    parser.add_argument("--output", type=Path, help="JSON file that holds what is known so far")
    options = parser.parse_args()
    if options.cpu_time:
        harness.clock = time.process_time
    device = torch.device(options.device)
    sizes = TOY if options.toy else Sizes(at_least=4.0 if device.type == "cpu" else 0.5)
    dtypes = [getattr(torch, name) for name in options.dtype]
    seconds: dict[str, float] = {}
    errors: dict[str, float] = {}
    skipped: list[str] = []
    failed: list[str] = []

    def keep(name: str, found: dict[str, float]) -> None:
        error = found.pop("bank_error", None)
        if error is not None:
            errors[name] = error
        seconds.update({f"{name}_{way}": value for way, value in found.items()})
        print(name, {way: f"{1e3 * x:.4g}" for way, x in found.items()}, "ms", flush=True)
        if options.output:
            known = {"seconds": seconds, "ratios": ratios_of(seconds), "bank_errors": errors,
                     "skipped": skipped, "failed": failed}  # fmt: skip
            options.output.write_text(json.dumps(known), encoding="utf-8")

    def try_and_keep(name: str, measure: Callable[[], dict[str, float]]) -> None:
        """What does not fit into a GPU's memory is left out; after any fault the rest goes on."""
        try:
            keep(name, measure())
        except torch.OutOfMemoryError:
            skipped.append(name)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def layers() -> None:
        for dtype in dtypes:
            for batch in options.batch:
                for context in options.context:
                    name = f"layer_{_name(dtype)}_b{batch}_{context // 1024}k"
                    # Keys, values, and the copies that gathering makes.
                    n = 4 * batch * context * sizes.n_head * sizes.head_dim
                    if n * dtype.itemsize / 1e9 > options.memory_gb:
                        skipped.append(name)
                        continue
                    arguments = batch, context, dtype, options.repeats, sizes, device
                    try_and_keep(name, partial(one_layer, *arguments))

    def models() -> None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        for batch in options.batch:
            for context in options.context:
                name = f"model_b{batch}_{context // 1024}k"
                n = sizes.model.n_layer * 2 * batch * context * sizes.model.d_model
                if n * dtype.itemsize / 2 / 1e9 > options.memory_gb:
                    skipped.append(name)
                    continue
                arguments = batch, context, dtype, options.repeats, sizes, device
                try_and_keep(name, partial(whole_model, *arguments))

    def llamas() -> None:
        for dtype in dtypes:
            for batch in options.llama_batch:
                name = _name(dtype) if batch == 1 else f"{_name(dtype)}_b{batch}"
                arguments = batch, dtype, options.llama_repeats, sizes, device
                try_and_keep(name, partial(against_llama, *arguments))

    # Where time is short, the more wanted come first.
    for part in (layers, llamas, models) if device.type == "cuda" else (layers, models, llamas):
        part()
    known_sizes = cache_bytes(32768, sizes.large)
    ratios = ratios_of(seconds)
    ratios["cache_bytes_fraction_32k"] = known_sizes["ours"] / known_sizes["full_cache"]
    settings = {**vars(options), "output": None, "threads": torch.get_num_threads()}
    report("decode", settings | {"skipped": skipped}, seconds, ratios, bank_errors=errors,
           bytes_780m_32k=known_sizes, peak_mb=peak_memory_mb())  # fmt: skip
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
