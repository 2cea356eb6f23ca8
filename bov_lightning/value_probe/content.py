"""What a probe's page shows, as tables and plots of a report."""

import math
import re

import numpy as np

from bov_lightning.report.content import Column, Plot, Report, Section, Series, Table
from bov_lightning.report.statistics import Estimate
from bov_lightning.value_probe.result import Cost, LayerResult, ProbeResult, SetResult

NORMAL = 1.96
"""Standard errors on either side of a 95% interval."""
FRAME = 0.5
"""Nats at which the closer look at the curves ends."""

SUMMARY = [
    Column("model"), Column("class"), Column("layers", "d"), Column("nats per token", ".3f"),
    Column("held-out tokens", ",d"), Column("need no context"), Column("order"),
    Column("last third", ".3f", True), Column("as many of the order", ".3f", True),
]  # fmt: skip
BY_LAYER = [
    Column("layer"), Column("nats", ".4f", True), Column("KL", ".4f"), Column("same token", ".1%"),
    Column("explained", ".1%"), Column("place in order", "d"), Column("values"),
    Column("regression counts as", ".2f"), Column("means"),
]  # fmt: skip
BY_SET = [
    Column("layers"), Column("which"), Column("own rows"), Column("nats", ".4f", True),
    Column("KL", ".4f"), Column("same token", ".1%"), Column("bytes saved per token", ",d"),
    Column("share of the V cache", ".1%"), Column("tables, MiB", ",.1f"),
    Column("pays from tokens", ",d"), Column("measured on tokens", ",d"),
]  # fmt: skip


def make_report(results: list[ProbeResult]) -> Report:
    """The page of one or several models."""
    names = {i: result.name for i, result in enumerate(results)}
    return Report(
        f"Values without context: {', '.join(names.values())}",
        "; ".join(_in_a_line(result) for result in results),
        [
            Section("What is lost, and what is saved", _texts(results), [
                Table("models", "Models", SUMMARY, [_summary(r) for r in results],
                      "Nats are lost per token, with 95% intervals over rows of text."),
                _curves(results, names, "cost_against_cache_saved", None),
                _curves(results, names, "cost_against_cache_saved_close", FRAME),
            ], names),
            Section("Layer by layer", [
                "A layer alone: its values come from a table, all others from the model.",
            ], [
                _strip(results, names, "cost_per_layer", "Cost of each layer alone", "nats"),
                _strip(results, names, "explained_per_layer",
                       "Variance of values that the token id explains", "explained"),
                *(_heads(result, i) for i, result in enumerate(results)),
                *(Table(f"layers_{_slug(result, i)}", f"Layers of {result.name}", BY_LAYER,
                        [_layer(result, layer) for layer in result.layers])
                  for i, result in enumerate(results)),
            ], names),
            Section("Which layers go together", [
                "Greedy order: each time the layer that costs least beside those that are gone. It "
                "is chosen on other held-out text than costs are measured on.",
                "Memory in bf16. A table pays once the whole batch caches as many tokens as it has "
                "rows; it is shared by all texts of a batch.",
            ], [
                *(Table(f"sets_{_slug(result, i)}", f"Sets of layers of {result.name}", BY_SET,
                        [_set(s) for s in (*result.curve, result.last_third,
                                           *result.small_tables)])
                  for i, result in enumerate(results)),
            ]),
        ],
    )  # fmt: skip


def as_text(result: ProbeResult) -> str:
    """A model for a terminal: a line for each layer, in the order in which they go."""
    lines = [
        f"{result.name}: {result.make} of {result.n_layer} layers, {result.nats:.3f} nats per "
        f"token on {result.tokens['measured']:,} held-out tokens",
        "going with those above it                                     alone",
        "layer      nats  +- error       KL  same token   saved     nats  explained",
    ]
    layers = {layer.layer: layer for layer in result.layers}
    for found in result.curve:
        layer = layers[found.layers[-1]]
        lines.append(
            f"{layer.layer:5d}{_costs(found)}{_number(layer.cost.nats, 9)}     "
            f"{layer.explained:6.1%}"
        )
    third = result.last_third
    lines.append(f"the last third, {third.layers[0]} to {third.layers[-1]}:\n     {_costs(third)}")
    return "\n".join(lines)


def _costs(found: SetResult) -> str:
    cost = found.cost
    return (
        f"{_number(cost.nats, 10)}{_number(cost.standard_error, 10)}{_number(cost.kl, 9)}"
        f"{cost.agreement:12.1%}{found.saved_share:8.1%}"
    )


def _number(value: float, width: int) -> str:
    """To four decimals; less than half of the last one is no minus."""
    return f"{round(value, 4) + 0.0:{width}.4f}"


def _in_a_line(result: ProbeResult) -> str:
    n = len(result.last_third.layers)
    text = (
        f"{result.name}: the last third of the layers costs {result.last_third.cost.nats:.3f} nats"
    )
    if len(result.curve) >= n:
        text += f", the {n} that cost least together {result.curve[n - 1].cost.nats:.3f}"
    return text


def _texts(results: list[ProbeResult]) -> list[str]:
    first = results[0].tokens
    texts = [
        f"Tables are made from {first['calibration']:,} tokens; settings and order are chosen on "
        f"{first['choice']:,} others, and costs measured on {first['measured']:,} more. Nothing is "
        "trained.",
        "Lines follow the greedy order; a single point is the paper's choice, the last third of "
        "the layers. Dashes are tables of the most frequent ids only.",
    ]
    if len({result.text for result in results}) > 1:
        texts.append(
            "The models read other tokens, so that their losses have different units: compare "
            "where costs lie, not the costs."
        )
    return texts


def _estimate(cost: Cost | None) -> Estimate | None:
    if cost is None or math.isnan(cost.standard_error):
        return None if cost is None else Estimate(cost.nats)
    reach = NORMAL * cost.standard_error
    return Estimate(cost.nats, cost.nats - reach, cost.nats + reach)


def _listed(layers: list[int]) -> str:
    return " ".join(map(str, layers)) or "none"


def _slug(result: ProbeResult, index: int) -> str:
    """Two directories may have one name."""
    return f"{index + 1}_{re.sub('[^A-Za-z0-9]+', '_', result.name).strip('_').lower()}"


def _summary(result: ProbeResult) -> list:
    n = len(result.last_third.layers)
    as_many = result.curve[n - 1].cost if len(result.curve) >= n else None
    return [
        result.name, result.make, result.n_layer, result.nats, result.tokens["measured"],
        _listed([layer.layer for layer in result.layers if layer.context_free]),
        _listed(result.order), _estimate(result.last_third.cost), _estimate(as_many),
    ]  # fmt: skip


def _layer(result: ProbeResult, layer: LayerResult) -> list:
    cost, kind = layer.cost, "from context"
    if layer.context_free:
        kind = "need none" if layer.cached else "a table"
    place = result.order.index(layer.layer) + 1 if layer.layer in result.order else None
    means = "exact" if layer.context_free else "by attention" if layer.weighted else "plain"
    return [
        str(layer.layer), _estimate(cost), cost and cost.kl, cost and cost.agreement,
        layer.explained, place, kind, None if layer.context_free else layer.strength, means,
    ]  # fmt: skip


def _set(found: SetResult) -> list:
    cost = found.cost
    return [
        str(len(found.layers)), _listed(found.layers),
        "all" if found.own_rows is None else f"{found.own_rows:,}", _estimate(cost), cost.kl,
        cost.agreement, found.saved_bytes_per_token, found.saved_share,
        found.table_bytes / 2**20, found.break_even_tokens, cost.n_token,
    ]  # fmt: skip


def _curves(
    results: list[ProbeResult], names: dict[int, str], slug: str, frame: float | None
) -> Plot:
    """Cost against cache saved: greedy, the paper's choice, small tables."""
    series = []
    for i, result in enumerate(results):
        zero = (0.0, 0.0)
        series.append(_line(result.name, i, [zero, *map(_point, result.curve)]))
        series.append(_line(f"{result.name}: last third", i, [_point(result.last_third)]))
        for n in sorted({s.own_rows for s in result.small_tables}):
            points = [_point(s) for s in result.small_tables if s.own_rows == n]
            series.append(_line(f"{result.name}: {n:,} own rows", i, [zero, *points], dashed=True))
    title = "Cost against cache saved"
    if frame is not None:
        title += ", closely"
        series = [_within(s, frame) for s in series]
        series = [s for s in series if len(s.x)]
    ends = ", ".join(f"{r.name} {r.curve[-1].cost.nats:.3g}" for r in results)
    return Plot(
        slug, title, f"{title}: with all layers that may go, nats lost are {ends}.", "saved_share",
        "nats", series, "lines", names, y_limit=frame,
        note="" if frame is None else f"What costs less than {frame} nats.",
    )  # fmt: skip


def _point(found: SetResult) -> tuple[float, float]:
    return found.saved_share, found.cost.nats


def _line(label: str, row: int, points: list[tuple[float, float]], dashed: bool = False) -> Series:
    x, y = np.array(points, dtype=float).T
    return Series(label, row, x, y, dashed=dashed)


def _within(series: Series, frame: float) -> Series:
    """What lies in the frame: a line up to where it leaves it."""
    outside = np.flatnonzero(series.y > frame)
    end = len(series.y) if len(outside) == 0 else outside[0]
    return Series(series.label, series.row, series.x[:end], series.y[:end], dashed=series.dashed)


def _strip(
    results: list[ProbeResult], names: dict[int, str], slug: str, title: str, y_name: str
) -> Plot:
    series = []
    for i, result in enumerate(results):
        shown = [layer for layer in result.layers if layer.cost is not None]
        y = [layer.cost.nats if y_name == "nats" else layer.explained for layer in shown]
        x = [float(layer.layer) for layer in shown]
        series.append(Series(result.name, i, np.array(x), np.array(y)))
    spread = np.concatenate([s.y for s in series])
    alt = f"{title}, from {spread.min():.3g} to {spread.max():.3g}."
    return Plot(slug, title, alt, "layer", y_name, series, "points", names, zero_line=True)


def _heads(result: ProbeResult, row: int) -> Plot:
    """How much of each head's values the token id explains."""
    cells = [
        (layer.layer, head, share)
        for layer in result.layers
        for head, share in enumerate(layer.explained_per_head)
    ]
    x, y, z = np.array(cells, dtype=float).T
    title = f"Heads of {result.name}: variance explained"
    return Plot(
        f"heads_{_slug(result, row)}", title, f"{title}, from {z.min():.3g} to {z.max():.3g}.",
        "layer", "head", [Series(result.name, row, x, y, z=z)], "map",
        note="Full colour: 100%.", z_name="explained",
    )  # fmt: skip
