"""Plots as SVG that takes its colours from the page, and as PNG."""

import io
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

from bov_lightning.report.content import Plot, Series, thinned
from bov_lightning.report.palette import COLOURS, colour, dashes

INK, FAINT = "#111111", "#c4c4c4"
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
NAMES = {
    "tokens": "tokens", "FLOPs": "FLOPs", "val_bpb": "val bpb", "train_loss": "training loss",
    "tokens_per_s": "tokens per second", "difference": "difference in val bpb", "layer": "layer",
    "coefficient": "coefficient", "cached_tokens": "cached tokens", "saved_MiB": "saved, MiB",
    "multiplier": "compute multiplier", "saved_share": "share of the V cache saved",
    "nats": "nats lost per token", "explained": "variance explained", "head": "value head",
}  # fmt: skip
STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": FAINT,
    "grid.linewidth": 0.5, "legend.frameon": False, "lines.linewidth": 1.5,
    "path.simplify": True,
}  # fmt: skip


def _line_style(index: int, dashed: bool = False) -> tuple[int, tuple[float, ...] | None]:
    pattern = "3 3" if dashed else dashes(index)
    return (0, tuple(float(n) for n in pattern.split()) or None)


def svg(plot: Plot) -> str:
    """The plot as an element for a page; rows are ``g[data-row]``, colours CSS variables."""
    with rc_context({**STYLE, "svg.hashsalt": plot.slug}):
        file = io.StringIO()
        _draw(thinned(_smoothed(plot)), legend=False).savefig(
            file, format="svg", transparent=True, metadata={"Date": None}
        )
    return _themed(file.getvalue(), plot)


def png(plot: Plot) -> bytes:
    """The plot as a picture on white, with a legend."""
    with rc_context(STYLE):
        file = io.BytesIO()
        _draw(thinned(_smoothed(plot)), legend=True).savefig(file, format="png", dpi=150)
    return file.getvalue()


def _smoothed(plot: Plot) -> Plot:
    """The plot with lines of many points as means over two hundredths of them."""

    def smooth(series: Series) -> Series:
        width = len(series.y) // 50
        if width < 2:
            return series
        sums = np.convolve(series.y, np.ones(width), "same")
        return replace(series, y=sums / np.convolve(np.ones(len(series.y)), np.ones(width), "same"))

    return replace(plot, series=[smooth(s) for s in plot.series]) if plot.smooth else plot


def _draw(plot: Plot, legend: bool) -> Figure:
    """Must run, and be saved, in one context of styles."""
    title, legend = legend, legend and plot.kind not in ("ranking", "map")
    shown = dict.fromkeys(series.row for series in plot.series)
    height = 3.4 + (0.2 * len(shown) / 2 if legend else 0)
    if plot.kind == "ranking":
        height = 1.0 + 0.27 * len(plot.series)
    figure = Figure(figsize=(5.4, height), layout="constrained")
    axes = figure.subplots()
    if plot.kind == "ranking":
        _draw_ranking(axes, plot)
    elif plot.kind == "map":
        _draw_map(axes, plot)
    else:
        _draw_lines(axes, plot)
    if title:
        figure.suptitle(plot.title, fontsize=10)
    if legend:
        handles = [
            Line2D([], [], color=COLOURS[colour(i)], linestyle=_line_style(i)) for i in shown
        ]
        labels = [plot.rows[i] for i in shown]
        # A label that starts with an underscore would be hidden.
        labels = [f"\u200b{label}" if label.startswith("_") else label for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _draw_lines(axes: Axes, plot: Plot) -> None:
    size, unit = plot.x_scale
    aside = _side_by_side(plot)
    for series in plot.series:
        x = series.x / size * aside.get(series.row, 1.0)
        axes.plot(
            x, series.y, color=COLOURS[colour(series.row)],
            linestyle=_line_style(series.row, series.dashed), gid=f"row-{series.row}",
            marker="o" if plot.kind == "points" or len(series.x) == 1 else None, markersize=4,
        )  # fmt: skip
        if series.low is not None:
            axes.vlines(x, series.low, series.high, linewidth=2,
                        color=COLOURS[colour(series.row)], gid=f"row-{series.row}")  # fmt: skip
    if plot.y_limit is not None:
        low = min(float(series.y.min()) for series in plot.series)
        margin = 0.04 * (plot.y_limit - low)
        axes.set_ylim(low - margin, plot.y_limit + margin)
    if plot.zero_line:
        axes.axhline(0, color=INK, linewidth=0.8)
    if plot.x_name in ("tokens", "cached_tokens"):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if plot.x_name == "layer":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if plot.y_name == "tokens_per_s":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if plot.x_name == "FLOPs" and plot.kind == "points":
        _draw_rungs(axes, plot, aside)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=plot.x_name == "layer"))
    x_label = f"training time, {unit}" if plot.x_name == "train_seconds" else NAMES[plot.x_name]
    axes.set(xlabel=x_label, ylabel=NAMES[plot.y_name])


def _side_by_side(plot: Plot) -> dict[int, float]:
    """By what x of each row is multiplied, so that intervals of one rung do not hide each other."""
    if plot.x_name != "FLOPs" or plot.kind != "points":
        return {}
    rows = list(dict.fromkeys(series.row for series in plot.series))
    # Losses are compared along the curves, where nothing may be moved.
    step = 1.06 if plot.y_name == "multiplier" else 1.0
    return {row: step ** (i - (len(rows) - 1) / 2) for i, row in enumerate(rows)}


def _draw_rungs(axes: Axes, plot: Plot, aside: dict[int, float]) -> None:
    """Compute on a logarithmic axis with the rungs as ticks; multipliers are named at the last."""
    axes.set_xscale("log")
    axes.set_xticks(sorted({float(f"{x:.0e}") for series in plot.series for x in series.x}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}".replace("e+", "e")))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.margins(x=0.15)
    for row, factor in aside.items():
        points = [
            (series.x[0] * factor, series.y[0]) for series in plot.series if series.row == row
        ]
        axes.plot(*zip(*points, strict=True), color=COLOURS[colour(row)], linewidth=0.8,
                  linestyle=_line_style(row), gid=f"row-{row}")  # fmt: skip
    if plot.y_name != "multiplier":
        return
    axes.axhline(1, color=INK, linewidth=0.8)
    last = {series.row: series for series in plot.series}
    for series in last.values():
        axes.annotate(
            _shortened(series.label, 20), (series.x[-1] * aside[series.row], series.y[-1]), (6, 6),
            textcoords="offset points", fontsize=8, color=COLOURS[colour(series.row)],
        )  # fmt: skip


def _draw_ranking(axes: Axes, plot: Plot) -> None:
    def draw(series: Series) -> None:
        style = {"color": COLOURS[colour(series.row)], "gid": f"row-{series.row}"}
        if series.low is not None:
            axes.hlines(series.y, series.low, series.high, linewidth=2, **style)
        axes.plot(series.x, series.y, "o", markersize=6, **style)

    for series in plot.series:
        draw(series)
    if plot.zero_line:
        axes.axvline(0, color=INK, linewidth=0.8)
    labels = [_shortened(series.label) for series in plot.series]
    axes.set_yticks([float(series.y[0]) for series in plot.series], labels)
    axes.set_ylim(len(labels) + 0.6, 0.4)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel=NAMES[plot.x_name])


def _draw_map(axes: Axes, plot: Plot) -> None:
    for series in plot.series:
        for x, y, z in zip(series.x, series.y, series.z, strict=True):
            axes.add_patch(Rectangle(
                (x - 0.5, y - 0.5), 1, 1, facecolor=COLOURS[colour(series.row)],
                alpha=float(np.clip(z, 0, 1)), linewidth=0, gid=f"row-{series.row}",
            ))  # fmt: skip
    ends = [(np.min(values) - 0.5, np.max(values) + 0.5) for values in (
        np.concatenate([s.x for s in plot.series]), np.concatenate([s.y for s in plot.series])
    )]  # fmt: skip
    axes.set(xlim=ends[0], ylim=ends[1], xlabel=NAMES[plot.x_name], ylabel=NAMES[plot.y_name])
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))


def _shortened(label: str, n: int = 36) -> str:
    return label if len(label) <= n else f"{label[: n - 1]}…"


def _themed(text: str, plot: Plot) -> str:
    """matplotlib's SVG as an element: unique ids, colours of the page, no size of its own."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(text)
    for child in root.findall(f"{{{SVG}}}metadata"):
        root.remove(child)
    variables = {c: f"var(--line-{i})" for i, c in enumerate(COLOURS)}
    variables |= {INK: "currentColor", FAINT: "var(--grid)"}
    pattern = re.compile("|".join(variables))
    for element in root.iter():
        attributes = element.attrib
        if identity := attributes.pop("id", None):
            if row := re.fullmatch(r"row-(\d+)", identity):
                attributes["data-row"] = row[1]
            else:
                attributes["id"] = f"{plot.slug}-{identity}"
        for name, value in list(attributes.items()):
            if name == f"{{{XLINK}}}href":
                del attributes[name]
                attributes["href"] = f"#{plot.slug}-{value.removeprefix('#')}"
            elif name in ("style", "fill", "stroke"):
                value = pattern.sub(lambda found: variables[found[0]], value)
                attributes[name] = re.sub(r"font: ?([\d.]+px)[^;]*", r"font-size: \1", value)
            elif name == "d":
                # A hundredth of a point cannot be seen.
                attributes[name] = re.sub(r"(\.\d\d)\d+", r"\1", value)
            elif value.startswith("url(#"):
                attributes[name] = f"url(#{plot.slug}-{value.removeprefix('url(#')}"
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": plot.alt}
    return ElementTree.tostring(root, encoding="unicode")
