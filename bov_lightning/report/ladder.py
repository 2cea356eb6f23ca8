"""Rows that were trained at several sizes: what they cost the baseline in compute."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bov_lightning.report.comparison import D_MLP, VALUE, Group, Row, describe, value_name
from bov_lightning.report.content import Cell, Column, Plot, Series, Table
from bov_lightning.report.effective_compute import EffectiveCompute, Rung, effective_compute
from bov_lightning.report.reading import Run

RUNG_KEYS = ("model.config", "model.budget", "batch.tokens")
"""What makes a rung, but for the values and their control; learning rates may differ."""


@dataclass(frozen=True)
class Arm:
    """The rows of one way of computing values, by rung."""

    name: str
    rows: dict[tuple, Row]

    @property
    def index(self) -> int:
        """Decides its colour."""
        return next(iter(self.rows.values())).index


def arms(group: Group) -> list[Arm]:
    """All that have a result; the baseline's first. A rung where an arm has two rows is left out:

    which of them is meant is not known.
    """
    found: dict[str, dict[tuple, list[Row]]] = {}
    for row in sorted(group.finished, key=lambda row: row is not group.baseline):
        found.setdefault(_name(row), {}).setdefault(_rung_of(row), []).append(row)
    made = [
        Arm(name, {rung: rows[0] for rung, rows in rungs.items() if len(rows) == 1})
        for name, rungs in found.items()
    ]
    return [arm for arm in made if arm.rows]


def _name(row: Row) -> str:
    run = row.first
    return value_name(run.value, run.d_mlp) or describe(run.value)


def _rung_of(row: Row) -> tuple:
    def belongs(key: str) -> bool:
        return key.startswith(RUNG_KEYS) and not key.startswith((VALUE, D_MLP))

    settings = row.first.settings
    return tuple(sorted((key, repr(value)) for key, value in settings.items() if belongs(key)))


def _flops(row: Row) -> float:
    return row.finished[0].flops


def _rung(row: Row | None, number: Callable[[Run], float]) -> Rung | None:
    if row is None:
        return None
    seconds = [run.train_seconds for run in row.finished]
    known = all(math.isfinite(s) and s > 0 for s in seconds)
    flops = _flops(row)
    return Rung(flops, row.by_seed(number), flops / float(np.mean(seconds)) if known else None)


def against_baseline(
    group: Group, number: Callable[[Run], float]
) -> tuple[Arm, dict[str, tuple[Arm, EffectiveCompute]]]:
    """The baseline's arm, and by name every other arm with its multipliers; none: no ladder."""
    baseline, *others = arms(group) or [Arm("", {})]
    rungs = sorted(baseline.rows, key=lambda rung: _flops(baseline.rows[rung]))
    base = [_rung(baseline.rows[rung], number) for rung in rungs]
    found: dict[str, Any] = {}
    for arm in others:
        result = effective_compute(base, [_rung(arm.rows.get(r), number) for r in rungs])
        if result is not None:
            found[arm.name] = arm, result
    return baseline, found


def items(group: Group, mark: str, number: Callable[[Run], float]) -> list[Table | Plot]:
    """Effective compute of all arms: a table, a table of trends, and a plot; none: no ladder."""
    baseline, found = against_baseline(group, number)
    if not found:
        return []
    columns = [
        Column("values"),
        Column("FLOPs", ".2e"),
        Column("compute multiplier", ".3f", estimates=True),
        Column("at equal time", ".3f", estimates=True),
    ]
    lines: list[list[Cell]] = [
        [name, rung.flops, rung.equal_flops, rung.equal_time]
        for name, (_, result) in found.items() for rung in result.rungs
    ]  # fmt: skip
    first = next(iter(found.values()))[1]
    law, warnings = first.law, dict.fromkeys(r.warning for _, r in found.values() if r.warning)
    curve = f"{law.floor:.3f} + {law.scale:.3g} C^-{law.exponent:.4f}"
    note = (
        f"How much compute {baseline.name} would need for the loss that the row has reached, over "
        f"the row's own: its curve is {curve}, moved through its loss at the same budget. "
        "Intervals are of 95%, over seeds and fit. Equal time compares training times too, and "
        "means something only where runs had a machine alike."
    )
    note += "".join(f" Beware: {warning}." for warning in warnings)
    made: list[Table | Plot] = [
        Table(f"effective_compute{mark}", f"Effective compute against {baseline.name}", columns,
              lines, note)
    ]  # fmt: skip
    trends = [[name, r.slope] for name, (_, r) in found.items() if r.slope is not None]
    if trends:
        made.append(Table(
            f"effective_compute_trend{mark}", "Does the gain last?",
            [Column("values"), Column("slope of log multiplier", "+.3f", estimates=True)], trends,
            "Per e-fold of compute. An interval below zero: the gain shrinks with scale.",
        ))  # fmt: skip
    return [*made, _plot(baseline, found, mark)]


def _plot(baseline: Arm, found: dict[str, tuple[Arm, EffectiveCompute]], mark: str) -> Plot:
    series, told = [], []
    for name, (arm, result) in found.items():
        for rung in result.rungs:
            m = rung.equal_flops
            point = np.array([rung.flops]), np.array([m.value])
            series.append(Series(name, arm.index, *point, m.low, m.high))
        told.append(f"{name} {result.rungs[0].equal_flops.value:.2f} to "
                    f"{result.rungs[-1].equal_flops.value:.2f}")  # fmt: skip
    alt = f"Compute that {baseline.name} needs for the same loss, in multiples: {'; '.join(told)}."
    return Plot(
        f"effective_compute_plot{mark}", "Effective compute", alt, "FLOPs", "multiplier", series,
        "points", {arm.index: name for name, (arm, _) in found.items()},
        note="Bars are 95% intervals; the line at 1 is the baseline.",
    )  # fmt: skip
