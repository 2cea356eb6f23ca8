"""`bov plan --inference --engine vllm`: the pages that vLLM makes of a memory size.

vLLM cuts the memory of its cache into blocks of some tokens. Layers of one window share a block
table; where windows differ, the layers are dealt out to groups of the same number, each with a
block table of its own, and a block belongs to one group at a time. Key-only pages of bank layers
hold twice the tokens there, since pages must be of one size. This is the arithmetic of vLLM 0.32
with pages layer by layer, as on CPUs; serving/vllm/tests compares it with what vLLM reports.
"""

import json
from dataclasses import dataclass, replace
from math import prod

import torch
from rich.console import Console
from rich.table import Table

from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.counting import count_parameters, meta_model
from bov_lightning.model.ngrams import rows_per_token

ID_BYTES = 4


@dataclass(frozen=True)
class Pages:
    """The pages of one layer."""

    window: int | None
    """Tokens to the left that the layer sees; None: all."""
    slots: int
    """Tokens of a page."""
    nbytes: int
    """Of a page."""
    keys_only: bool


@dataclass(frozen=True)
class PagesPlan:
    """What a memory size gives."""

    block_bytes: int
    blocks: int
    blocks_per_request: int
    """Of a request of the whole context."""
    id_bytes: int
    """Of the buffers of token ids and row numbers, which lie beside vLLM's memory."""

    @property
    def requests(self) -> float:
        """Requests of the whole context that have room at the same time."""
        return self.blocks / self.blocks_per_request


def layer_pages(
    config: TransformerConfig, kind: str, block_size: int, element_bytes: int
) -> list[Pages]:
    """The pages of each layer; ``kind``: stored or keys."""
    vector = config.d_value * element_bytes
    found = []
    for block in meta_model(config).blocks:
        keys_only = kind == "keys" and block.attention.value.bank is not None
        n_vector = 1 if keys_only else 2
        found.append(Pages(block.window, block_size, block_size * n_vector * vector, keys_only))
    if len({page.window for page in found}) > 1:
        # Several groups share the memory, so all pages are of one size.
        largest = max(page.nbytes for page in found)
        more = [largest // page.nbytes for page in found]
        found = [
            replace(page, slots=page.slots * n, nbytes=largest)
            for page, n in zip(found, more, strict=True)
        ]
    return found


def group(pages: list[Pages]) -> list[list[Pages]]:
    """The groups that share a block table."""
    if len({page.window for page in pages}) == 1:
        return [pages]
    alike: dict[Pages, list[Pages]] = {}
    for page in pages:
        alike.setdefault(page, []).append(page)
    counts = [len(layers) for layers in alike.values()]
    # Few layers more than the smallest kind has: padding wastes less than more block tables.
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups = []
    for layers in alike.values():
        n_group = -(-len(layers) // size)
        groups += [layers[i::n_group] for i in range(n_group)]
    return groups


def pages_plan(
    config: TransformerConfig, kind: str, memory: int, context: int, block_size: int,
    batched_tokens: int, element_bytes: int,
) -> PagesPlan:  # fmt: skip
    """What vLLM makes of ``memory`` bytes.

    Args:
        config: the network.
        kind: ``stored``, or ``keys`` for pages of keys alone in bank layers.
        memory: bytes of vLLM's cache.
        context: tokens of a request, vLLM's max_model_len.
        block_size: tokens of a block.
        batched_tokens: new tokens under way, which a window keeps beside its own: vLLM's
            max_num_batched_tokens, twice where it prepares a step during the one before.
        element_bytes: of a number in the cache.

    Raises:
        UserError: a memory in which not even one request fits.
    """
    pages = layer_pages(config, kind, block_size, element_bytes)
    groups = group(pages)
    block_bytes = max(sum(page.nbytes for page in layers) for layers in groups)
    blocks = memory // block_bytes
    needed = 0
    for window, slots in ((layers[0].window, layers[0].slots) for layers in groups):
        if window is None:
            needed += -(-context // slots)
        else:
            # One more, since a window need not start where a block does.
            needed += -(-min(window + batched_tokens, context) // slots) + 1
    # vLLM keeps one block for itself.
    if blocks - 1 < needed:
        raise UserError(
            f"one request of {context:,} tokens needs {(needed + 1) * block_bytes:,} bytes of "
            f"pages, and there are {memory:,}: give more --memory or a shorter --context"
        )
    # Token ids lie with the last layer, row numbers once for each block table of a bank's.
    n_slot = sum(layers[0].slots for layers in groups if any(page.keys_only for page in layers))
    n_number = n_slot * prod(rows_per_token(meta_model(config).lookup_source, "meta"))
    ids = ID_BYTES * (blocks * (pages[-1].slots + n_number) + 1)
    return PagesPlan(block_bytes, blocks, needed, ids)


def print_serving_plan(
    config: TransformerConfig, memory: int, context: int, block_size: int, batched_tokens: int,
    dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Prints the blocks and requests of both kinds of pages, as a table or one JSON object."""
    element_bytes = getattr(torch, dtype).itemsize
    plans = {
        kind: pages_plan(
            config, kind, memory, context, block_size, batched_tokens, element_bytes
        )
        for kind in ("stored", "keys")
    }  # fmt: skip
    tables = element_bytes * count_parameters(config).tables
    if as_json:
        rows = {name: {**vars(plan), "requests": plan.requests} for name, plan in plans.items()}
        print(json.dumps({"memory": memory, "context": context, "table_bytes": tables, **rows}))
        return
    table = Table(box=None)
    table.add_column(f"{memory:,} bytes, {context:,} tokens, {dtype}", style="bold")
    for column in ("blocks", "per request", "requests", "ids beside"):
        table.add_column(column, justify="right")
    for kind, label in (
        ("stored", "keys and values"),
        ("keys", "keys alone where there is a bank"),
    ):
        plan = plans[kind]
        table.add_row(
            label, f"{plan.blocks:,}", f"{plan.blocks_per_request:,}", f"{plan.requests:.2f}",
            f"{plan.id_bytes / 2**20:.1f} MiB",
        )  # fmt: skip
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    console.print(f"value tables {tables / 2**20:.1f} MiB, whatever the number of requests")
