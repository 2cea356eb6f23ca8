"""Serving with vLLM: one layer whose pages hold keys alone against vLLM's own with stored values.

    python benchmarks/serving.py [--dtype float32 bfloat16] [--repeats 9]

In an environment with vLLM for CPUs, `bov-vllm` and `bov-lightning`. Both attend on one thread, in
turns within this process; medians. Pages lie shuffled, and as many layers take turns as their keys
and values fill more than the processor's caches. Token ids follow Zipf's distribution.
"""

import argparse
import sys
import time
from itertools import cycle
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import harness
from harness import report, side_by_side
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from bov_vllm.key_only import best_for_many
from bov_vllm.key_only_arithmetic import Scratch, attend_pages, requests_of, write_slots

VOCAB = 32768
COLD_BYTES = 256e6
"""Keys and values of all layers together, at least."""
CASES = {
    "decode_1k": [(1, 1024)],
    "decode_4k": [(1, 4096)],
    "decode_8k": [(1, 8192)],
    "decode_32k": [(1, 32768)],
    "decode_1k_batch_8": [(1, 1024)] * 8,
    "decode_4k_batch_8": [(1, 4096)] * 8,
    "drafts_5_of_1k": [(5, 1024)],
    "drafts_5_of_4k": [(5, 4096)],
    "prefill_1k": [(1024, 1024)],
    "prefill_4k": [(4096, 4096)],
    "prefill_512_of_2k": [(512, 2048)],
    "prefill_512_of_8k": [(512, 8192)],
    "prefill_128_of_1k": [(128, 1024)],
    "prefill_128_of_8k": [(128, 8192)],
    "prefill_48_of_1k": [(48, 1024)],
    "prefill_48_of_8k": [(48, 8192)],
    "prefill_2k_of_32k": [(2048, 32768)],
}
"""Requests: new tokens, and tokens in all."""
WINDOWED = {
    "window_511_decode_4k": [(1, 4096)],
    "window_511_prefill_2k": [(2048, 2048)],
    "window_511_prefill_512_of_4k": [(512, 4096)],
}
WINDOW = 511


def zipf_ids(n_token: int, generator: torch.Generator) -> torch.Tensor:
    """Rank r has probability proportional to 1/r."""
    weight = 1 / torch.arange(1, VOCAB + 1, dtype=torch.float32)
    ranks = torch.multinomial(weight, n_token, replacement=True, generator=generator)
    return torch.randperm(VOCAB, generator=generator)[ranks]


def one_layer(
    case: list[tuple[int, int]], window: int | None, heads: tuple[int, int], head_dim: int,
    n_slot: int, dtype: torch.dtype, repeats: int,
) -> dict[str, float]:  # fmt: skip
    """Seconds of one layer's attention."""
    generator = torch.Generator().manual_seed(0)
    n_head, n_kv_head = heads
    n_pages = [-(-n_token // n_slot) for _, n_token in case]
    n_page = sum(n_pages)
    page_table = torch.zeros(len(case), max(n_pages), dtype=torch.int32)
    order = torch.randperm(n_page, generator=generator).int()
    query_start = [0]
    for row, (n_new, _) in enumerate(case):
        page_table[row, : n_pages[row]] = order[: n_pages[row]]
        order = order[n_pages[row] :]
        query_start.append(query_start[-1] + n_new)
    n_tokens = [n_token for _, n_token in case]
    table = torch.randn(VOCAB, n_kv_head * head_dim).to(dtype)
    page_ids = torch.zeros(n_page, n_slot, dtype=torch.int32)
    q = torch.randn(query_start[-1], n_head, head_dim).to(dtype)
    scale, isa = head_dim**-0.5, _get_attn_isa(dtype, n_slot, head_dim)
    bytes_per_layer = 2 * n_page * n_slot * n_kv_head * head_dim * dtype.itemsize
    n_layer = max(2, -int(-COLD_BYTES // bytes_per_layer))
    layers = []
    slots = torch.arange(n_page * n_slot)
    ids = zipf_ids(len(slots), generator)
    for _ in range(n_layer):
        kept = torch.float16 if dtype == torch.bfloat16 else dtype
        keys = torch.empty(n_page, n_kv_head, head_dim, n_slot, dtype=kept)
        stored = torch.empty(n_page, n_kv_head, 2 * n_slot, head_dim, dtype=dtype)
        for chunk in slots.split(4096):
            new = torch.randn(len(chunk), n_kv_head, head_dim).to(dtype)
            write_slots(new, ids[chunk], chunk, keys.mT, page_ids)
            values = table[ids[chunk]].unflatten(1, (n_kv_head, head_dim))
            ops.cpu_attn_reshape_and_cache(new, values, *stored.chunk(2, dim=2), chunk, isa)
        layers.append((keys, *stored.chunk(2, dim=2)))
    starts = torch.tensor(query_start, dtype=torch.int32)
    lengths = torch.tensor(n_tokens, dtype=torch.int32)
    vllm_window = -1 if window is None else window + 1
    plan = ops.cpu_attn_get_scheduler_metadata(
        len(case), n_head, n_kv_head, head_dim, lengths, dtype, starts, True, vllm_window, isa, True
    )
    requests, scratch = requests_of(query_start, n_tokens, page_table, n_slot), Scratch()
    found, expected = torch.empty_like(q), torch.empty_like(q)

    def stored_values(layer) -> None:
        _, keys, values = layer
        ops.cpu_attention_with_kv_cache(
            q, keys, values, expected, starts, lengths, scale, True, None, vllm_window, page_table,
            0.0, plan, None,
        )  # fmt: skip

    def key_only(layer) -> None:
        attend_pages(
            q, layer[0], page_ids, table, requests, window, scale, found, scratch,
            best_for_many(n_slot, head_dim),
        )  # fmt: skip

    stored_values(layers[0])
    key_only(layers[0])
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2), error
    turns = {"stored": cycle(layers), "key_only": cycle(layers)}
    return side_by_side(
        {
            "stored": lambda: stored_values(next(turns["stored"])),
            "key_only": lambda: key_only(next(turns["key_only"])),
        },
        repeats,
    )


@torch.inference_mode()
def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--heads", type=int, nargs=2, default=[12, 12], help="query and key-value")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--slots", type=int, default=128, help="of a page; vLLM's default: 128")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names hold one of these")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="not wall-clock time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cpu_time:
        harness.clock = time.process_time
    seconds: dict[str, float] = {}
    for dtype in options.dtype:
        for name, case in (CASES | WINDOWED).items():
            if options.only and not any(part in name for part in options.only):
                continue
            found = one_layer(
                case, WINDOW if name in WINDOWED else None, tuple(options.heads), options.head_dim,
                options.slots, getattr(torch, dtype), options.repeats,
            )  # fmt: skip
            seconds |= {f"{dtype}_{name}_{way}": value for way, value in found.items()}
            milliseconds = {way: round(1e3 * value, 2) for way, value in found.items()}
            ratio = found["key_only"] / found["stored"]
            print(f"{dtype} {name}: {milliseconds} ms, ratio {ratio:.2f}", flush=True)
    names = [name.removesuffix("_stored") for name in seconds if name.endswith("_stored")]
    ratios = {name: seconds[f"{name}_key_only"] / seconds[f"{name}_stored"] for name in names}
    report("serving", vars(options), seconds, ratios)


if __name__ == "__main__":
    main()
