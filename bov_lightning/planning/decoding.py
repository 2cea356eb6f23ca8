"""`bov plan --inference`: what decoding keeps and reads, before anything is served.

Everything is counted from the network and its cache, built without memory.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bov_lightning.errors import UserError
from bov_lightning.model.cache import Cache
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.counting import break_even_tokens, meta_model, with_standard_values

ELEMENT_BYTES = 2
"""Weights, tables and cache in bf16."""

VOCABULARIES = (32_768, 131_072)
"""The two of the plot."""


def meta_cache(config: TransformerConfig, batch: int, context: int) -> Cache:
    """The bf16 cache of so many rows and tokens, without memory."""
    blocks = meta_model(config).blocks
    return Cache(config, blocks, batch, context, torch.bfloat16, torch.device("meta"))


def weight_bytes(config: TransformerConfig) -> tuple[int, int, int]:
    """Bytes of the matrices that every token reads, of the value tables, of everything."""
    model = meta_model(config)
    groups = model.grouped_parameters()
    everything = sum(p.numel() for p in model.parameters())
    tables = sum(p.numel() for p in groups.get("table", []))
    embedding = sum(p.numel() for p in groups["embedding"])
    read = everything - tables - embedding
    return tuple(ELEMENT_BYTES * n for n in (read, tables, everything))


def _read_per_step(config: TransformerConfig, batch: int, context: int) -> int:
    """Bytes that decoding one token of every row reads at least: weights, keys, values."""
    vectors = 0
    for block in meta_model(config).blocks:
        seen = context if block.window is None else min(context, block.window + 1)
        vectors += seen + block.attention.value.vectors_read(seen)
    return weight_bytes(config)[0] + batch * vectors * config.d_value * ELEMENT_BYTES


def inference_plan(config: TransformerConfig, batch: int, context: int) -> dict:
    """What `bov plan --inference` prints; bytes in bf16.

    ``break_even`` counts cached tokens over the whole batch from which the tables take less room
    than what they save: against caches that are whole in all layers (the paper's |V|), and against
    window caches at this context.
    """
    if batch < 1 or context < 1:
        raise UserError("--batch and --context are at least 1")
    standard = with_standard_values(config)
    whole = replace(standard, window_pattern="L")
    caches = {
        name: meta_cache(shape, batch, context).nbytes
        for name, shape in {"full_standard": whole, "standard": standard, "this": config}.items()
    }
    _, tables, weights = weight_bytes(config)
    saved_per_row = (caches["standard"] - caches["this"]) / batch
    rows = -(-tables // saved_per_row) if tables and saved_per_row > 0 else None
    return {
        "batch": batch,
        "context": context,
        "cache_bytes": caches,
        "cache_bytes_per_layer": meta_cache(config, batch, context).nbytes_per_layer,
        "fraction_of_full_standard": caches["this"] / caches["full_standard"],
        "table_bytes": tables,
        "weight_bytes": {"this": weights, "standard": weight_bytes(standard)[2]},
        "break_even": {
            "cached_tokens_full_caches": break_even_tokens(config),
            "cached_tokens_window_caches": None if rows is None else int(rows) * context,
        },
        "read_bytes_per_step": {
            "this": _read_per_step(config, batch, context),
            "standard": _read_per_step(standard, batch, context),
            "full_standard": _read_per_step(whole, batch, context),
        },
    }


def print_inference_plan(
    config: TransformerConfig,
    batch: int,
    context: int,
    bandwidth: float,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Prints the plan as a table or as one JSON object, and draws it.

    ``bandwidth`` in GB/s bounds the tokens per second: decoding is reading.
    """
    if bandwidth <= 0:
        raise UserError("--bandwidth is above 0, in GB/s")
    plan = inference_plan(config, batch, context)
    steps = {name: 1e9 * bandwidth / read for name, read in plan["read_bytes_per_step"].items()}
    plan["tokens_per_s_at_most"] = {name: batch * rate for name, rate in steps.items()}
    plan["bandwidth_gb_per_s"] = bandwidth
    if plot is not None:
        draw(config, batch, context, plot)
    if as_json:
        print(json.dumps(plan))
        return
    caches, reads, rates = (
        plan[name] for name in ("cache_bytes", "read_bytes_per_step", "tokens_per_s_at_most")
    )

    def gib(n: int) -> str:
        return f"{n / 2**30:.3f} GiB"

    table = Table(box=None)
    table.add_column(f"{batch:,} x {context:,} tokens, bf16", style="bold")
    for column in ("cache", "read per step", f"tokens/s at {bandwidth:g} GB/s"):
        table.add_column(column, justify="right")
    for name, label in (
        ("full_standard", "standard values, all keys and values"),
        ("standard", "standard values, window caches"),
        ("this", "this recipe"),
    ):
        table.add_row(label, gib(caches[name]), gib(reads[name]), f"at most {rates[name]:,.0f}")
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    even = plan["break_even"]
    console.print(
        f"this recipe's cache is {plan['fraction_of_full_standard']:.1%} of all keys and values; "
        f"value tables {gib(plan['table_bytes'])}, shared by the batch"
    )
    if even["cached_tokens_full_caches"]:
        console.print(
            f"the tables pay off above {even['cached_tokens_full_caches']:,} cached tokens over "
            "the batch against whole caches, "
            + (
                f"{even['cached_tokens_window_caches']:,} against window caches at this context"
                if even["cached_tokens_window_caches"]
                else "never against window caches"
            )
        )


def draw(config: TransformerConfig, batch: int, context: int, path: Path) -> None:
    """Two plots against the context: the paper's V cache saved, and whole caches beside it.

    The left one counts elements as the paper does, L_bank * d * (T - |V|), for two vocabularies.
    """
    from matplotlib.figure import Figure

    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {path}: end the name in .png, .svg or .pdf")
    n_point = 24
    longest = max(4 * context, 4 * max(VOCABULARIES))
    contexts = [longest * (i + 1) // n_point for i in range(n_point)]
    n_bank = sum(not block.attention.value.value_cache for block in meta_model(config).blocks)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for vocabulary in VOCABULARIES:
        saved = [
            ELEMENT_BYTES * n_bank * config.d_value * (n - vocabulary) / 2**30 for n in contexts
        ]
        left.plot(contexts, saved, label=f"|V| = {vocabulary:,}")
    left.axhline(0, color="grey", linewidth=0.8)
    left.set(xlabel="cached tokens over the batch", ylabel="V cache saved, GiB")
    tables = weight_bytes(config)[1] / 2**30
    standard = with_standard_values(config)
    shapes = {
        "standard, whole": replace(standard, window_pattern="L"),
        "standard, window caches": standard,
        "this recipe": config,
    }
    for label, shape in shapes.items():
        sizes = [meta_cache(shape, batch, n).nbytes / 2**30 for n in contexts]
        right.plot(contexts, sizes, label=label)
    right.plot(
        contexts, [size + tables for size in sizes], "--", label="this recipe and its tables"
    )
    right.set(xlabel=f"context of each of {batch:,} rows", ylabel="cache, GiB")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
