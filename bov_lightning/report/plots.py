"""What the plots show: the paper's figures 2, 4, 5a and 5b, and what a run cost."""

import math
from collections.abc import Callable

import numpy as np

from bov_lightning.report.comparison import Group, Row
from bov_lightning.report.content import Plot, Series
from bov_lightning.report.reading import Run

ELEMENT_BYTES = 2
"""Tables and cache in bf16."""
SETTLED = 0.3
"""Curves are framed by what they show after this part of a run."""


def curves(group: Group, mark: str) -> list[Plot]:
    """Bits per byte against tokens, FLOPs and time (figure 4), loss and throughput."""
    made = [
        _curve(group, f"val_bpb_against_{x_name.lower()}{mark}", f"Bits per byte against {title}",
               x_name, "val_bpb")
        for x_name, title in (("tokens", "tokens"), ("FLOPs", "FLOPs"), ("train_seconds", "time"))
    ]  # fmt: skip
    made += [
        _curve(group, f"{y_name}{mark}", f"{title} against tokens", "tokens", y_name)
        for y_name, title in (("train_loss", "Training loss"), ("tokens_per_s", "Throughput"))
    ]
    return [plot for plot in made if plot is not None]


def _x_of(run: Run, name: str) -> np.ndarray:
    if name == "FLOPs":
        return run.metrics["tokens"] * run.facts["flops_per_token"]
    return run.metrics[name]


def _curve(group: Group, slug: str, title: str, x_name: str, y_name: str) -> Plot | None:
    """One line per run; None where no run has two points."""
    series: list[Series] = []
    without: dict[str, list[str]] = {}
    for row in group.rows:
        for run in row.runs:
            x, y = _x_of(run, x_name), run.metrics[y_name]
            there = np.isfinite(x) & np.isfinite(y)
            if there.any():
                series.append(Series(run.name, row.index, x[there], y[there]))
            else:
                missing = x_name if np.isfinite(y).any() else y_name
                without.setdefault(missing, []).append(run.name)
    if not any(len(s.x) > 1 for s in series):
        return None
    limit = None if y_name == "tokens_per_s" else _frame(series)
    smooth = y_name != "val_bpb" and max(len(s.x) for s in series) >= 100
    text = ["Drawn as a running mean; the data is as measured."] if smooth else []
    if limit is not None:
        text.append("The frame leaves out the start of the curves; the data has it.")
    for missing, names in without.items():
        text.append(f"Not shown, for want of {missing}: {', '.join(names)}.")
    longest = max(float(s.x.max()) for s in series)
    scale = _time_scale(longest) if x_name == "train_seconds" else (1.0, "")
    ends = [float(s.y[-1]) for s in series]
    alt = (f"{title}: {len(series)} lines, which end between {min(ends):.4g} and {max(ends):.4g}. "
           "The tables have the numbers.")  # fmt: skip
    return Plot(
        slug, title, alt, x_name, y_name, series, rows=_legend(group), note=" ".join(text),
        x_scale=scale, y_limit=limit, smooth=smooth,
    )  # fmt: skip


def _legend(group: Group) -> dict[int, str]:
    return {row.index: row.label for row in group.rows}


def _frame(series: list[Series]) -> float | None:
    """The highest y after the start of the curves; None where that is nearly everything."""
    settled = [s.y[s.x >= SETTLED * s.x[-1]].max() for s in series]
    top, everything = max(settled), max(s.y.max() for s in series)
    low = min(s.y.min() for s in series)
    return float(top) if everything - low > 1.3 * (top - low) > 0 else None


def _time_scale(seconds: float) -> tuple[float, str]:
    return next(
        (
            (size, unit)
            for size, unit in ((3600.0, "hours"), (60.0, "minutes"))
            if seconds > 3 * size
        ),
        (1.0, "seconds"),
    )


def rankings(group: Group, mark: str, number: Callable[[Run], float]) -> list[Plot]:
    """Final numbers of all rows, their differences to the baseline, and those of Bank of Values'
    variants to it (figure 5b)."""
    base, rows = group.baseline, group.finished
    if len(rows) < 2:
        return []
    made = [
        _ranking(f"val_bpb_ranking{mark}", "Final bits per byte", "val_bpb", rows, None, number)
    ]
    if base in rows:
        title = f"Difference to {base.label}"
        slug = f"val_bpb_difference{mark}"
        made.append(_ranking(slug, title, "difference", rows, base, number))
    banks = [row for row in rows if _is_bank(row)]
    bov = next((row for row in banks if row.value_name == "bov"), None)
    if bov is not None and len(banks) > 1:
        title = f"Variants of {bov.label}: difference to it"
        made.append(_ranking(f"ablation{mark}", title, "difference", banks, bov, number))
    return made


def _is_bank(row: Row) -> bool:
    value = row.first.value
    return value.get("source") == "bank" and value.get("coefficient") != "gate"


def _ranking(
    slug: str, title: str, x_name: str, rows: list[Row], base: Row | None,
    number: Callable[[Run], float],
) -> Plot:  # fmt: skip
    """Rows by their number, or by its difference to that of ``base``."""
    others = [row for row in rows if row is not base]
    found = [(row.mean(number) if base is None else row.minus(base, number), row) for row in others]
    found.sort(key=lambda pair: pair[0].value)
    series = [
        Series(row.label, row.index, np.array([e.value]), np.array([float(rank)]), e.low, e.high)
        for rank, (e, row) in enumerate(found, start=1)
    ]
    ends = [f"{e.value:.4f} ({row.label})" for e, row in (found[0], found[-1])]
    note = "Bars are 95% intervals over seeds; a row of one seed has none."
    if base is not None:
        note = "Bars are 95% intervals, paired over common seeds; one such seed gives none."
    return Plot(
        slug, title, f"{title}, from {ends[0]} to {ends[1]}.", x_name, "rank", series, "ranking",
        note=note, zero_line=base is not None,
    )  # fmt: skip


def coefficients(group: Group, mark: str) -> list[Plot]:
    """Learned coefficients per layer, mean over seeds (figure 2)."""
    series = []
    for row in group.finished:
        names = dict.fromkeys(name for run in row.finished for name in run.coefficients)
        for name in sorted(names):
            per_run = [run.coefficients[name] for run in row.finished if name in run.coefficients]
            layers = sorted(set.intersection(*(set(found) for found in per_run)))
            values = [np.mean([found[layer] for found in per_run]) for layer in layers]
            context = name == "context_coefficient"
            label = f"{row.label}: context" if context else row.label
            series.append(
                Series(label, row.index, np.array(layers, float), np.array(values), dashed=context)
            )
    if not series:
        return []
    spread = [float(v) for s in series for v in s.y]
    alt = f"Learned coefficients by layer, from {min(spread):.3g} to {max(spread):.3g}."
    return [Plot(
        f"coefficients{mark}", "Learned coefficients per layer", alt, "layer", "coefficient",
        series, "points", _legend(group), zero_line=True,
        note="Means over seeds, at the newest checkpoint. Where context is added, dashes are its "
        "coefficient.",
    )]  # fmt: skip


def cache_saved(group: Group, mark: str) -> list[Plot]:
    """V cache saved against cached tokens, tables paid for (figure 5a)."""
    saving = [row for row in group.rows if _saved_per_token(row) > 0]
    if not saving:
        return []
    even = [_table_bytes(row) / _saved_per_token(row) for row in saving]
    longest = 4 * (max(even) or saving[0].first.settings.get("model.config.sequence_len") or 1024)
    tokens = np.linspace(0, longest, 41)
    series = [
        Series(row.label, row.index, tokens,
               (_saved_per_token(row) * tokens - _table_bytes(row)) / 2**20)
        for row in saving
    ]  # fmt: skip
    pays = [f"{row.label} {math.ceil(n):,}" for row, n in zip(saving, even, strict=True) if n]
    alt = "V cache saved grows with cached tokens. It starts to pay off at: " + (
        "; ".join(pays) or "the first token"
    )
    return [Plot(
        f"v_cache_saved{mark}", "V cache saved", f"{alt}.", "cached_tokens", "saved_MiB",
        series, "lines", _legend(group), zero_line=True,
        note="In bf16, all tokens kept in all layers, value tables subtracted; cached tokens are "
        "those of the whole batch, which shares the tables.",
    )]  # fmt: skip


def _saved_per_token(row: Row) -> int:
    """Bytes of cache that the row's values save per token."""
    cache = row.first.facts["cache"]
    return cache["bytes_per_token_standard"] - cache["bytes_per_token"]


def _table_bytes(row: Row) -> int:
    return ELEMENT_BYTES * row.first.facts["params"]["tables"]
