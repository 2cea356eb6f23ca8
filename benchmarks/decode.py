"""Decoding: a bank against cached values, one layer and whole models, memory, and Llama.

    python benchmarks/decode.py [--context 1024 8192 32768 131072] [--batch 1 8] [--repeats 7]

Everything that is compared runs in turns within this one process; medians. Token ids are drawn from
Zipf's distribution over the vocabulary, which is how often real tokens repeat.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))

import harness
from harness import peak_memory_mb, report, side_by_side

from bov_lightning.inference.decoding import Decoding
from bov_lightning.inference.sampling import Sampling
from bov_lightning.model.cache import Cache
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.counting import meta_model, with_standard_values
from bov_lightning.model.decode import attend_bank, attend_values
from bov_lightning.model.ngrams import largest_prime, ngram_keys
from bov_lightning.model.transformer import Transformer

N_HEAD, HEAD_DIM, VOCAB = 12, 128, 32768
BOV = ValueConfig("bank", "last_third", "learned")
NGRAM_ROWS = largest_prime(2**16)
MODEL_135M = TransformerConfig(12, 6, 6, 768, VOCAB, 2048, "SSSL", value=BOV)
MODEL_780M = TransformerConfig(24, 12, 12, 1536, VOCAB, 2048, "SSSL", value=BOV)


def zipf_ids(n_row: int, n_token: int) -> torch.Tensor:
    """(B, T) token ids; rank r has probability proportional to 1/r."""
    generator = torch.Generator().manual_seed(0)
    weight = 1 / torch.arange(1, VOCAB + 1, dtype=torch.float32)
    ranks = torch.multinomial(weight, n_row * n_token, replacement=True, generator=generator)
    return torch.randperm(VOCAB, generator=generator)[ranks].view(n_row, n_token)


def one_layer(batch: int, context: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Seconds of one layer's attention for one new token per row."""
    ids = zipf_ids(batch, context)
    table = torch.randn(VOCAB, N_HEAD * HEAD_DIM).to(dtype)
    query = torch.randn(batch, N_HEAD, 1, HEAD_DIM).to(dtype)
    key, value = (
        torch.empty(batch, N_HEAD, context, HEAD_DIM, dtype=dtype).normal_() for _ in range(2)
    )

    bigrams = ngram_keys(torch.stack((ids, ids.roll(1, dims=1)), dim=-1)) % NGRAM_ROWS + VOCAB
    row_ids = torch.cat((ids[..., None], bigrams), dim=-1)
    wider = torch.cat((table, torch.randn(NGRAM_ROWS, N_HEAD * HEAD_DIM).to(dtype)))

    def gather() -> None:
        rows = F.embedding(ids, table).view(batch, context, N_HEAD, HEAD_DIM).transpose(1, 2)
        F.scaled_dot_product_attention(query, key, rows)

    actions = {
        "cached": lambda: F.scaled_dot_product_attention(query, key, value),
        "cached_ours": lambda: attend_values(query, key, value, None),
        "gather": gather,
        "bank": lambda: attend_bank(query, key, ids, table, None),
        "ngram_bank": lambda: attend_bank(query, key, row_ids, wider, None, (1.0, 1.0)),
    }
    return side_by_side(actions, repeats)


def filled(cache: Cache, n_token: int) -> Cache:
    """``cache`` as if its rows had seen so many random tokens."""
    cache.pretend(zipf_ids(cache.batch_size, n_token))
    for store in cache.stores:
        store.kept.normal_()
    return cache


def whole_model(batch: int, context: int, repeats: int) -> dict[str, float]:
    """Seconds per token of the 135M model with and without banks."""
    actions = {}
    for name, config in {"bov": MODEL_135M, "standard": with_standard_values(MODEL_135M)}.items():
        model = Transformer(config).eval()
        cache = filled(model.new_cache(batch, context + max(repeats, 50) + 1), context)
        token = zipf_ids(batch, 1)
        actions[name] = lambda model=model, token=token, cache=cache: model(token, cache=cache)
    return side_by_side(actions, repeats)


def against_llama(dtype: torch.dtype, n_prompt: int, n_new: int, repeats: int) -> dict[str, float]:
    """Seconds of 135M models for a prompt and for the greedy tokens after it.

    Llama's MLP has three matrices: two thirds of the width give it as many parameters.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=VOCAB, hidden_size=768, num_hidden_layers=12, num_attention_heads=6,
        intermediate_size=2048, max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    llama = LlamaForCausalLM(shape).to(dtype).eval()
    ours = Transformer(MODEL_135M).to(dtype).eval()
    prompt = zipf_ids(1, n_prompt)

    def theirs(n: int) -> None:
        found = llama.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False
        )
        assert found.shape[1] == n_prompt + n

    def decode(n: int) -> None:
        decoding = Decoding(ours, prompt.tolist(), Sampling(n, temperature=0), n_prompt + n)
        while any(decoding.running):
            decoding.step()

    return side_by_side(
        {
            "llama": lambda: theirs(n_new),
            "ours": lambda: decode(n_new),
            "llama_prompt": lambda: theirs(1),
            "ours_prompt": lambda: decode(1),
        },
        repeats,
        at_least=0,
    )


def cache_bytes(context: int) -> dict[str, int]:
    """Bytes of the 780M model's cache, of its tables, and of all keys and values, in bf16."""

    def tensors(config: TransformerConfig) -> int:
        blocks = meta_model(config).blocks
        cache = Cache(config, blocks, 1, context, torch.bfloat16, torch.device("cpu"))
        return cache.nbytes

    full = replace(with_standard_values(MODEL_780M), window_pattern="L")
    tables = sum(t.numel() for t in meta_model(MODEL_780M).grouped_parameters()["table"])
    return {
        "ours": tensors(MODEL_780M),
        "window_caches": tensors(with_standard_values(MODEL_780M)),
        "full_cache": tensors(full),
        "tables": 2 * tables,
    }


@torch.inference_mode()
def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192, 32768, 131072])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--llama-repeats", type=int, default=0, help="after a first; 0: once")
    parser.add_argument("--memory-gb", type=float, default=16, help="skip what needs more")
    parser.add_argument("--cpu-time", action="store_true", help="not wall-clock time")
    options = parser.parse_args()
    if options.cpu_time:
        harness.clock = time.process_time

    seconds: dict[str, float] = {}
    skipped: list[str] = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in options.batch:
            for context in options.context:
                name = f"{str(dtype).removeprefix('torch.')}_b{batch}_{context // 1024}k"
                # Keys, values, and the copies that gathering makes.
                need = 4 * batch * context * N_HEAD * HEAD_DIM * dtype.itemsize / 1e9
                if need > options.memory_gb:
                    skipped.append(f"layer_{name}")
                    continue
                found = one_layer(batch, context, dtype, options.repeats)
                seconds |= {f"layer_{name}_{way}": value for way, value in found.items()}
                print(name, {way: round(1e3 * value, 2) for way, value in found.items()}, "ms")
    for batch in options.batch:
        for context in options.context:
            name = f"b{batch}_{context // 1024}k"
            if 12 * 2 * batch * context * 768 * 4 / 2 / 1e9 > options.memory_gb:
                skipped.append(f"model_{name}")
                continue
            found = whole_model(batch, context, options.repeats)
            seconds |= {f"model_{name}_{values}": value for values, value in found.items()}
            print("model", name, {way: round(1e3 * value, 2) for way, value in found.items()}, "ms")
    for dtype in (torch.float32, torch.bfloat16):
        found = against_llama(dtype, 2048, 256, options.llama_repeats)
        kind = str(dtype).removeprefix("torch.")
        seconds |= {f"{kind}_{name}": value for name, value in found.items()}
        print("llama", kind, {name: round(value, 2) for name, value in found.items()}, "s")

    def layer(first: str, second: str, context: int, dtype: str) -> float:
        name = f"layer_{dtype}_b1_{context // 1024}k"
        return seconds[f"{name}_{first}"] / seconds[f"{name}_{second}"]

    def tokens_per_s(kind: str) -> float:
        theirs = seconds[f"{kind}_llama"] - seconds[f"{kind}_llama_prompt"]
        return theirs / (seconds[f"{kind}_ours"] - seconds[f"{kind}_ours_prompt"])

    sizes = cache_bytes(32768)
    ratios = {
        f"{bank}_vs_{other}_{context // 1024}k{suffix}": layer(bank, other, context, dtype)
        for bank in ("bank", "ngram_bank")
        for dtype, suffix in (("float32", ""), ("bfloat16", "_bfloat16"))
        for other in ("cached", "gather", "cached_ours")
        for context in options.context
        if 1 in options.batch
    } | {
        **{
            f"bov_vs_standard_{context // 1024}k": seconds[f"model_b1_{context // 1024}k_bov"]
            / seconds[f"model_b1_{context // 1024}k_standard"]
            for context in options.context
            if 1 in options.batch
        },
        "cache_bytes_fraction_32k": sizes["ours"] / sizes["full_cache"],
        "vs_llama": tokens_per_s("float32"),
        "vs_llama_bfloat16": tokens_per_s("bfloat16"),
        "vs_llama_with_prompt": seconds["float32_llama"] / seconds["float32_ours"],
        "vs_llama_bfloat16_with_prompt": seconds["bfloat16_llama"] / seconds["bfloat16_ours"],
    }
    settings = {**vars(options), "threads": torch.get_num_threads(), "skipped": skipped}
    report("decode", settings, seconds, ratios, bytes_780m_32k=sizes, peak_mb=peak_memory_mb())


if __name__ == "__main__":
    main()
