"""The table that is printed last: every number beside what was wanted."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol


class Found(Protocol):
    """What the table needs of a stage's outcome."""

    status: str
    found: dict[str, Any]


class Row(NamedTuple):
    """One line, of one stage."""

    stage: str
    what: str
    key: str
    """Where the number lies in the stage's results: names with a colon between them."""
    form: str = "{}"
    wanted: str = ""
    meets: Callable[[Any], bool] | None = None
    """Whether a number is as wanted."""


def at_most(limit: float) -> dict[str, Any]:
    """What a `Row` wants."""
    return {"wanted": f"<= {limit:g}", "meets": lambda value: value <= limit}


def at_least(limit: float, form: str = "{:g}") -> dict[str, Any]:
    """What a `Row` wants."""
    return {"wanted": f">= {form.format(limit)}", "meets": lambda value: value >= limit}


def _training(size: str, mfu: float) -> list[Row]:
    where = f"bov-{size.lower()}"
    bov = f"{where}:bov_compiled"
    return [
        Row("d", f"{size} rows by bov plan; tokens/s", f"{bov}:summary"),
        Row("d", f"{size} MFU, the recipe's step", f"{bov}:mfu", "{:.1%}",
            **at_least(mfu, "{:.0%}")),
        Row("d", f"{size} MFU, a step of 4 micro-steps", f"{bov}:mfu_of_4", "{:.1%}"),
        Row("d", f"{size} MFU if its products were all", f"{where}:mfu_of_products", "{:.1%}"),
        Row("d", f"{size} BoV's step over standard", f"{where}:bov_over_standard", "{:.3f}",
            **at_most(1.0)),
        Row("d", f"{size} tokens/s over Llama's", f"{where}:bov_over_llama", "{:.2f}",
            **at_least(1.0)),
        Row("d", f"{size} as bov fit trains, over bare", f"{where}:fit_over_bare", "{:.3f}",
            **at_most(1.03)),
        Row("d", f"{size} peak memory over the plan's", f"{where}:peak_over_plan", "{:.2f}",
            **at_most(1.0)),
    ]  # fmt: skip


def _layer(batch: int, context: int) -> Row:
    return Row("e", f"bank over cached V, {context}k x {batch}",
               f"ratios:bank_vs_cached_{context}k_bfloat16{'' if batch == 1 else f'_b{batch}'}",
               "{:.2f}", **at_most(0.8))  # fmt: skip


ROWS = [
    Row("a", "the machine", "machine"),
    Row("b", "tests marked gpu", "summary", wanted="none fails",
        meets=lambda text: " 0 failed" in text),
    Row("c", "killed, resumed, used", "summary", wanted="all",
        meets=lambda text: text.startswith("all")),
    Row("c", "first losses against the CPU's", "loss_difference", "{:.4f}", **at_most(0.0039)),
    Row("c", "val_bpb, GPU and CPU resumed", "val_bpb"),
    *_training("780M", 0.45),
    *_training("135M", 0.40),
    *(_layer(1, context) for context in (8, 32, 128)),
    *(_layer(32, context) for context in (8, 32)),
    Row("e", "tokens/s over Llama's, 1 row", "ratios:vs_llama_bfloat16", "{:.2f}", **at_least(1.0)),
    Row("e", "tokens/s over Llama's, 32 rows", "ratios:vs_llama_bfloat16_b32", "{:.2f}",
        **at_least(1.0)),
    Row("f", "a save's stall over a step", "ratios:stall_vs_recipe_step", "{:.2f}", **at_most(1.0)),
    Row("g", "780M fp8 tokens/s over bf16", "bov-780m:fp8_over_bf16", "{:.2f}", **at_least(1.0)),
    Row("h", "ladder", "summary"),
]  # fmt: skip


def look_up(found: dict[str, Any], key: str) -> Any:
    """What lies there; None where nothing does."""
    for name in key.split(":"):
        found = found.get(name) if isinstance(found, dict) else None
    return None if isinstance(found, float) and math.isnan(found) else found


def table(names: dict[str, str], outcomes: dict[str, Found], rows: list[Row]) -> str:
    """One line per row whose stage was asked for; a number that is missing has its stage's status.

    Args:
        names: of the stages, by letter.
        outcomes: of the stages that ran, by letter.
        rows: what to show.
    """
    lines = [f"{'':1} {'':36} {'measured':>28}  {'wanted':10}"]
    for row in rows:
        if row.stage not in outcomes:
            continue
        outcome = outcomes[row.stage]
        value = look_up(outcome.found, row.key)
        if value is None:
            shown = outcome.status if outcome.status != "ok" else "-"
            lines.append(f"{row.stage} {row.what:36} {shown:>28}  {row.wanted}".rstrip())
            continue
        verdict = ""
        if row.meets is not None:
            verdict = "met" if row.meets(value) else "MISSED"
        shown = row.form.format(value).partition("\n")[0][:60]
        lines.append(f"{row.stage} {row.what:36} {shown:>28}  {row.wanted:10} {verdict}".rstrip())
    for letter, outcome in outcomes.items():
        if outcome.status.startswith(("failed", "out")):
            lines.append(f"{letter} {names[letter]}: {outcome.status}; see logs.tar.gz")
    return "\n".join(lines) + "\n"
