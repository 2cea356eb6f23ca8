"""The tables, and the order in which a report tells things."""

from collections.abc import Callable

import numpy as np

from bov_lightning.report import benchmarks, ladder, plots
from bov_lightning.report.comparison import Group, Row
from bov_lightning.report.content import Cell, Column, Report, Section, Table
from bov_lightning.report.palette import N_STYLE
from bov_lightning.report.published import published, published_bpb
from bov_lightning.report.reading import Run, Unusable

LEVEL_NOTE = (
    "Mean over seeds, with the 95% interval of the t distribution in brackets: each for one "
    "comparison, so that among many rows some are clear of zero by chance. "
)
PAIRED_NOTE = (
    "Differences are paired over the seeds that both rows have, since runs of one seed share "
    "initial weights and the order of the data; where there is only one such seed, they have no "
    "interval."
)
APART = (
    "Some runs were measured on other held-out text or with another tokenizer, or it is not known "
    "on what. Their bits per byte cannot be compared, so every such group of runs has tables and "
    "axes of its own."
)


def make_report(groups: list[Group], unusable: list[Unusable]) -> Report:
    """Everything that the runs have to say."""
    sections = []
    for number, group in enumerate(groups, start=1):
        mark = f"-{number}" if len(groups) > 1 else ""
        title = f"Group {number}: " if mark else ""
        sections.append(_group_section(group, mark, f"{title}Results"))
    runs = [run for group in groups for run in group.runs]
    n_row = sum(len(group.rows) for group in groups)
    n_unfinished = sum(run.unfinished is not None for run in runs)
    counts = [
        f"{_count(len(runs), 'run')} in {_count(n_row, 'row')}",
        f"{len(groups)} groups that cannot be compared" if len(groups) > 1 else "",
        f"{n_unfinished} unfinished" if n_unfinished else "",
        f"{len(unusable)} unusable" if unusable else "",
    ]
    text = [APART] if len(groups) > 1 else []
    for number, group in enumerate(groups, start=1):
        text += _finding(group, f"Group {number}: the" if len(groups) > 1 else "The")
    items = [table] if (table := _left_out(runs, unusable)) else []
    overview = Section("Overview", text, items)
    last = [Section("Runs", [], [_runs(groups)])] if runs else []
    title = f"Report of {_count(len(runs) + len(unusable), 'run')}"
    return Report(title, ", ".join(filter(None, counts)), [overview, *sections, *last])


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _finding(group: Group, start: str) -> list[str]:
    """The lowest bits per byte, in a sentence; nothing where less than two rows have a result."""
    rows = group.finished
    if len(rows) < 2:
        return []
    best = min(rows, key=lambda row: row.mean(_bpb).value)
    text = f"{start} lowest val bpb is {best.mean(_bpb).value:.4f}, of {best.label}"
    change = best.minus(group.baseline, _bpb)
    if change is None:
        return [f"{text}."]
    text += f": {change.value:+.4f} to {group.baseline.label}"
    if not change.has_interval:
        return [f"{text}, from one seed: how much of it is noise is not known."]
    clear = "clear of zero" if change.clear_of_zero else "not clear of zero"
    return [f"{text}, 95% interval [{change.low:+.4f}, {change.high:+.4f}], {clear}."]


def _left_out(runs: list[Run], unusable: list[Unusable]) -> Table | None:
    rows = [[bad.name, f"unusable: {bad.reason}"] for bad in unusable]
    rows += [[run.name, f"no result: {run.unfinished}"] for run in runs if run.unfinished]
    rows += [[run.name, note] for run in runs for note in run.notes]
    columns = [Column("run"), Column("problem")]
    note = "Curves show unfinished runs as far as they went."
    return Table("left_out", "Runs with a problem", columns, rows, note) if rows else None


def _group_section(group: Group, mark: str, title: str) -> Section:
    """Everything about runs that can be compared."""
    legend = {row.index: row.label for row in group.rows}
    measured = ", ".join(f"{name} {value}" for name, value in group.data.items())
    text = [f"Measured with {measured}."]
    if len(group.rows) > N_STYLE:
        text.append(f"Every {N_STYLE} rows the colours and dashes of lines begin again.")
    results = [_results(group, mark)] if group.finished else []
    curves = plots.curves(group, mark)
    details = [
        *ladder.items(group, mark, _bpb),
        *plots.rankings(group, mark, _bpb),
        *benchmarks.tables(group, mark),
        *plots.coefficients(group, mark),
        *plots.cache_saved(group, mark),
    ]
    cost = [_parameters(group, mark), *([_cost(group, mark)] if group.finished else [])]
    return Section(title, text, [*results, *curves, *details, *cost], legend)


def _bpb(run: Run) -> float:
    return run.val_bpb


def _results(group: Group, mark: str) -> Table:
    rows, base = group.finished, group.baseline
    with_paper = any(published_bpb(row) is not None for row in rows)
    columns = [
        Column("values"),
        Column("seeds"),
        Column("val bpb", ".4f", estimates=True),
        Column(f"difference to {base.label}", "+.4f", estimates=True),
        *([Column("paper val bpb", ".3f"), Column("paper difference", "+.3f")] * with_paper),
        Column("steps", ",d"),
        Column("tokens", ",d"),
        Column("FLOPs", ".2e"),
    ]
    lines: list[list[Cell]] = []
    for row in rows:
        run = row.finished[0]
        line = [row.label, _seeds(row), row.mean(_bpb), row.minus(base, _bpb)]
        if with_paper:
            theirs, reference = published_bpb(row), published_bpb(base)
            comparable = published(row) is published(base) and None not in (theirs, reference)
            line += [theirs, theirs - reference if comparable and row is not base else None]
        lines.append([*line, run.step, run.tokens, run.flops])
    note = LEVEL_NOTE + PAIRED_NOTE
    if with_paper:
        note += " Paper: arXiv 2606.02780, on its own text and tokenizer."
    return Table(f"results{mark}", "Bits per byte at the end", columns, lines, note)


def _seeds(row: Row) -> str:
    return ", ".join(sorted({str(run.seed) for run in row.finished}, key=lambda s: (len(s), s)))


def _parameters(group: Group, mark: str) -> Table:
    columns = [
        Column("values"),
        Column("parameters with standard values", ",d"),
        Column("in value tables", ",d"),
        Column("live", ",d"),
        Column("FLOPs per token", ",d"),
        Column("KV cache bytes per token", ",d"),
        Column("tables pay off above cached tokens", ",d"),
    ]
    lines: list[list[Cell]] = []
    for row in group.rows:
        facts = row.first.facts
        params, cache = facts["params"], facts["cache"]
        even = cache.get("break_even_tokens")
        lines.append([
            row.label, params["baseline"], params["tables"], params["live"],
            facts["flops_per_token"], cache["bytes_per_token"],
            even if isinstance(even, int) else None,
        ])  # fmt: skip
    note = (
        "Live is everything that is stored and trained, tables included; the cache is in bf16, "
        "with all tokens kept in all layers."
    )
    return Table(f"parameters{mark}", "Parameters", columns, lines, note)


def _median(name: str) -> Callable[[Run], float]:
    def number(run: Run) -> float:
        values = run.metrics[name]
        return float(np.nanmedian(values)) if np.isfinite(values).any() else float("nan")

    return number


def _cost(group: Group, mark: str) -> Table:
    columns = [
        Column("values"),
        Column("device-hours", ".3g"),
        Column("hours", ".3g"),
        Column("tokens per second", ",.0f"),
        Column("MFU", ".1%"),
    ]
    numbers = (
        lambda run: run.device_hours,
        lambda run: run.train_seconds / 3600,
        _median("tokens_per_s"),
        _median("mfu"),
    )
    lines: list[list[Cell]] = []
    for row in group.finished:
        means = [row.mean(number) for number in numbers]
        lines.append([row.label, *(mean and mean.value for mean in means)])
    note = (
        "Means over seeds: hours of training, without validation and saving; the median of a run's "
        "throughput. "
        "Runs that shared a machine say little about speed."
    )
    return Table(f"cost{mark}", "Cost of one run", columns, lines, note)


def _runs(groups: list[Group]) -> Table:
    columns = [
        Column("run"),
        Column("values"),
        Column("seed", "d"),
        Column("steps", ",d"),
        Column("planned", ",d"),
        Column("val bpb", ".4f"),
        Column("tokens", ",d"),
        Column("FLOPs", ".2e"),
        Column("device-hours", ".3g"),
        Column("tokens per second", ",.0f"),
        Column("devices"),
        Column("commit"),
    ]
    lines = [
        [
            run.name, row.label, run.seed if isinstance(run.seed, int) else None,
            run.step, run.facts["iterations"], run.val_bpb,
            run.tokens, run.flops, run.device_hours, _median("tokens_per_s")(run),
            f"{run.facts['world_size']} x {_text(run.facts.get('device'))}",
            _text(run.facts.get("git_commit"))[:9],
        ]
        for group in groups
        for row in group.rows
        for run in row.runs
    ]  # fmt: skip
    return Table("runs", "Every run", columns, lines)


def _text(value: object) -> str:
    return "-" if value is None else str(value)
