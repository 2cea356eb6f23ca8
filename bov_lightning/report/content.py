"""What a report holds, as data: all formats show the same numbers."""

import csv
import io
import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from bov_lightning.report.statistics import Estimate

Cell = str | float | int | None | Estimate


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    spec: str = ""
    """How numbers are shown, a format specification; empty: the column holds text."""
    estimates: bool = False
    """Whether cells are `Estimate`; files then hold two more columns, with the interval."""

    @property
    def key(self) -> str:
        """The column's name in files: val_bpb."""
        return self.name.replace(" ", "_").replace("-", "_")


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row."""

    slug: str
    """The name of its file."""
    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    note: str = ""
    """What the numbers must not be read without."""


@dataclass(frozen=True)
class Series:
    """One line, or one point with its interval."""

    label: str
    row: int
    """Index of the `Row` that it belongs to: its colour and dashes."""
    x: np.ndarray
    y: np.ndarray
    low: float | None = None
    high: float | None = None
    dashed: bool = False
    """Another measure of the same row."""
    z: np.ndarray | None = None
    """In a map: how full the colour is at each point, from 0 to 1."""


@dataclass(frozen=True)
class Plot:
    """A plot, without a decision of how it looks."""

    slug: str
    title: str
    alt: str
    """For those who do not see it."""
    x_name: str
    y_name: str
    series: list[Series]
    kind: Literal["lines", "points", "ranking", "map"] = "lines"
    """lines; points joined by thin lines, where x is a number of layers; one labelled row for
    each series, with x and its interval; or squares, whose colours are fuller where z is larger."""
    rows: dict[int, str] = field(default_factory=dict)
    """Label by index of row, for the legend."""
    note: str = ""
    x_scale: tuple[float, str] = (1.0, "")
    """What x is divided by for drawing, and the unit that this makes."""
    y_limit: float | None = None
    """Where the frame ends."""
    zero_line: bool = False
    smooth: bool = False
    """Whether a line is drawn as a running mean where it has many points."""
    z_name: str = ""
    """What a map's colours are, in files."""


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    text: list[str]
    items: list[Table | Plot]
    rows: dict[int, str] = field(default_factory=dict)
    """Label by index of row, for a legend above everything; empty: none."""


@dataclass(frozen=True)
class Report:
    """All of it."""

    title: str
    summary: str
    """One line."""
    sections: list[Section]

    @property
    def tables(self) -> list[Table]:
        """All tables."""
        return [item for s in self.sections for item in s.items if isinstance(item, Table)]

    @property
    def plots(self) -> list[Plot]:
        """All plots."""
        return [item for s in self.sections for item in s.items if isinstance(item, Plot)]


def plain(value: str | float | int | None) -> str:
    """A value as files hold it: numbers in full."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(float(value)) if isinstance(value, float) else str(value)


def shown(cell: Cell, column: Column) -> str:
    """A cell as people read it."""
    if isinstance(cell, Estimate):
        value = format(cell.value, column.spec)
        if not cell.has_interval:
            return value
        return f"{value} [{format(cell.low, column.spec)}, {format(cell.high, column.spec)}]"
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "-"
    return cell if isinstance(cell, str) else format(cell, column.spec)


def sort_key(cell: Cell) -> str:
    """What a column is sorted by: the text that files hold."""
    return plain(cell.value if isinstance(cell, Estimate) else cell)


def table_csv(table: Table) -> str:
    """The table as a file."""
    header: list[str] = []
    for column in table.columns:
        header.append(column.key)
        if column.estimates:
            header += [f"{column.key}_low", f"{column.key}_high"]
    lines = []
    for row in table.rows:
        line: list[str] = []
        for cell, column in zip(row, table.columns, strict=True):
            if column.estimates:
                cell = Estimate(math.nan) if cell is None else cell
                line += [plain(cell.value), plain(cell.low), plain(cell.high)]
            else:
                line.append(plain(cell))
        lines.append(line)
    return _csv([header, *lines])


def plot_csv(plot: Plot) -> str:
    """All points of the plot as a file."""
    intervals = any(series.low is not None for series in plot.series)
    names = [plot.x_name, plot.y_name, *([plot.z_name] if plot.z_name else [])]
    rows = [["series", *names, *(["low", "high"] if intervals else [])]]
    for series in plot.series:
        ends = [plain(series.low), plain(series.high)] if intervals else []
        columns = [series.x, series.y, *([] if series.z is None else [series.z])]
        rows += [
            [series.label, *(plain(float(number)) for number in point), *ends]
            for point in zip(*columns, strict=True)
        ]
    return _csv(rows)


def _csv(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def thinned(plot: Plot, n_point: int = 8_000) -> Plot:
    """The plot with about so many points at most: the lowest and highest of each stretch of a line.

    They are points that were measured; peaks stay.
    """
    if sum(len(series.x) for series in plot.series) <= n_point:
        return plot
    n_bucket = max(20, n_point // len(plot.series) // 2)
    thin = []
    for series in plot.series:
        n = len(series.x)
        if n > 2 * n_bucket + 2:
            edges = np.linspace(1, n - 1, n_bucket + 1).astype(int)
            kept = {0, n - 1}
            for start, end in itertools.pairwise(edges):
                kept |= {start + int(series.y[start:end].argmin())}
                kept |= {start + int(series.y[start:end].argmax())}
            index = sorted(kept)
            series = replace(series, x=series.x[index], y=series.y[index])
        thin.append(series)
    return replace(plot, series=thin)
