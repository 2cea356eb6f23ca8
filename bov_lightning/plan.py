"""`bov plan`: what a recipe costs, before anything is bought."""

import json

from rich.console import Console
from rich.table import Table

from bov_lightning.budget import accumulation, make_plan
from bov_lightning.errors import UserError
from bov_lightning.optim.groups import scaled
from bov_lightning.recipe import Recipe


def print_plan(recipe: Recipe, origin: str, n_device: int, as_json: bool) -> None:
    """Prints the plan as a table, or as one JSON object."""
    model, batch = recipe.model, recipe.batch
    if model.budget is None:
        raise UserError(f"{origin}: model.budget is not set: give flops, tokens or steps")
    if n_device < 1:
        raise UserError(f"--devices is {n_device}: at least 1")
    n_micro = accumulation(batch.tokens, batch.micro, model.config.sequence_len, n_device)
    plan = make_plan(model.config, model.budget, batch.tokens, n_device)
    plan["accumulation"] = n_micro
    plan["optimizer"] = scaled(model.optimizer, model.config, batch.tokens)
    if as_json:
        print(json.dumps(plan))
        return
    params, memory, cache = plan["params"], plan["memory"], plan["cache"]
    rows = [
        ("parameters, live", f"{params['live']:,}"),
        ("  of these in value tables", f"{params['tables']:,}"),
        ("  same recipe, standard values", f"{params['baseline']:,}"),
        ("FLOPs per token", f"{plan['flops_per_token']:,}"),
        ("iterations", f"{plan['iterations']:,}"),
        ("tokens", f"{plan['tokens']:,}"),
        ("FLOPs", f"{plan['flops']:.4g}"),
        ("batch", f"{batch.tokens:,} tokens = {n_device} devices x {n_micro} micro-steps"),
        *(
            (f"{name} per device", f"{memory[f'{name}_bytes'] / 2**30:.2f} GiB")
            for name in ("weights", "gradient", "optimizer")
        ),
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
    Console(highlight=False).print(table)
