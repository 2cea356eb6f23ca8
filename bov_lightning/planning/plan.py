"""`bov plan`: what a recipe costs, before anything is bought."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from bov_lightning.distributed.layout import Layout, read_layout
from bov_lightning.errors import UserError
from bov_lightning.model.lookup import source_class
from bov_lightning.optim.groups import scaled
from bov_lightning.planning.cost import make_plan
from bov_lightning.planning.devices import device_memory, parse_bytes
from bov_lightning.planning.memory import KINDS, PARTS, host_memory, plan_memory
from bov_lightning.planning.own_source import try_own_source
from bov_lightning.recipe.budget import accumulation
from bov_lightning.recipe.given import Given
from bov_lightning.recipe.sections import Recipe

HOST = {
    "tables": "host memory per device, for tables",
    "gradients": "  for gradients of their rows, at most",
    "checkpoint": "  for a checkpoint's copy of them",
}
"""What `host_memory` gives, in words."""


def print_plan(given: Given, n_device: int | None, available: str | None, as_json: bool) -> None:
    """Prints the plan as a table, or as one JSON object.

    Args:
        given: what is to be trained.
        n_device: devices of the run; None: those of the recipe.
        available: memory of a device, such as 80GB; None: that of this machine's GPUs, if any.
        as_json: print JSON.

    Raises:
        UserError: a run that cannot start, or (after printing) that does not fit into the memory.
    """
    recipe, budget = given.recipe, given.budget
    model, batch = recipe.model, recipe.batch
    if n_device is not None and n_device < 1:
        raise UserError(f"--devices is {n_device}: at least 1")
    layout = read_layout(recipe.trainer, n_device)
    n_device = layout.world_size
    if available is not None:
        limit = parse_bytes(available)
    else:
        limit = device_memory() if layout.cuda else None
    n_micro = accumulation(batch.tokens, batch.micro, model.config.sequence_len, n_device)
    try_own_source(model.config)
    plan = make_plan(model.config, budget, batch.tokens)
    plan["accumulation"] = n_micro
    plan["optimizer"] = scaled(model.optimizer, model.config, batch.tokens)
    plan["memory_per_device"] = memory = plan_memory(recipe, layout, n_micro)
    if recipe.tables_on == "host":
        plan["host_memory_per_device"] = host_memory(recipe, layout, n_micro)
    if as_json:
        print(json.dumps(plan))
    else:
        _print_table(recipe, plan, n_device)
    if limit is not None:
        check_fit(recipe, layout, memory, limit)


def _print_table(recipe: Recipe, plan: dict, n_device: int) -> None:
    params, memory, cache = plan["params"], plan["memory_per_device"], plan["cache"]
    n_micro, on_host = plan["accumulation"], plan.get("host_memory_per_device", {})
    batch = f"{recipe.batch.tokens:,} tokens = {n_device} devices x {n_micro} micro-steps"
    rows = [
        ("parameters, live", f"{params['live']:,}"),
        ("  of these in value tables", f"{params['tables']:,}"),
        ("  same recipe, standard values", f"{params['baseline']:,}"),
        ("FLOPs per token", f"{plan['flops_per_token']:,}"),
        ("iterations", f"{plan['iterations']:,}"),
        ("tokens", f"{plan['tokens']:,}"),
        ("FLOPs", f"{plan['flops']:.4g}"),
        ("batch", batch),
        ("memory per device, at its peak", f"{memory['peak'] / 2**30:.2f} GiB"),
        ("  which is in the", PARTS[memory["peak_in"]]),
        *((f"  {kind}, at most", f"{memory[kind] / 2**30:.2f} GiB") for kind in KINDS),
        *((HOST[kind], f"{size / 2**30:.2f} GiB") for kind, size in on_host.items()),
        ("KV cache per token", f"{cache['bytes_per_token']:,} bytes in bf16"),
        ("  with standard values", f"{cache['bytes_per_token_standard']:,} bytes"),
    ]
    if cache["break_even_tokens"]:
        rows.append(("  tables pay off above", f"{cache['break_even_tokens']:,} cached tokens"))
    rows += [(name, f"{value:.4g}") for name, value in plan["optimizer"].items()]
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False, emoji=False).print(table)


def check_fit(recipe: Recipe, layout: Layout, memory: dict[str, Any], available: int) -> None:
    """A peak above the ``available`` bytes of a device is a `UserError` that gives advice."""
    if memory["peak"] <= available:
        return
    kept = sum(memory[kind] for kind in ("parameters", "gradients", "optimizer", "tables"))
    advice = []
    if memory["peak_in"] != "optimizer":
        if not recipe.activation_checkpointing:
            advice.append("activation_checkpointing true")
        if recipe.batch.micro > 1:
            advice.append(f"a batch.micro below {recipe.batch.micro}")
    if kept > 0.1 * memory["peak"]:
        if not layout.sharded:
            advice.append("trainer.strategy fsdp")
        elif layout.replicate > 1:
            advice.append(f"fewer copies than replicate {layout.replicate}")
        advice.append(f"more devices than {layout.world_size}")
        in_rows = source_class(recipe.model.config.value.source).reads_as_bank()
        if in_rows and recipe.tables_on == "device" and memory["tables"] > 0.5 * memory["peak"]:
            advice.append("tables_on host")
        if layout.cuda and not layout.half:
            advice.append("trainer.precision bf16-mixed")
    raise UserError(
        f"the plan needs {memory['peak'] / 2**30:.2f} GiB per device in the "
        f"{PARTS[memory['peak_in']]}, but a device has {available / 2**30:.2f} GiB: try "
        + (" or ".join(advice) or "a smaller model.config")
    )
