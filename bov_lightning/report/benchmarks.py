"""Benchmarks by category and task, from the results that evaluations left in the runs."""

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from bov_lightning.report.comparison import Group, Row
from bov_lightning.report.content import Cell, Column, Table
from bov_lightning.report.published import published_benchmark
from bov_lightning.report.reading import Run
from bov_lightning.report.statistics import Estimate
from evaluation.report import (
    NOISE,
    PROTOCOLS,
    Interval,
    aggregate_metric,
    bootstrap,
    group_interval,
    group_pairs,
    notes,
)
from evaluation.results import metrics

OTHER = "other"


def tables(group: Group, mark: str) -> list[Table]:
    """A table by category, and one by task; none where nothing was evaluated."""
    scores = {id(run): _scores(run) for row in group.finished for run in row.finished}
    rows = [row for row in group.finished if any(scores[id(run)] for run in row.finished)]
    if not rows:
        return []
    means = _means_of_groups(rows)
    names = [
        name
        for name in dict.fromkeys(n for found in scores.values() for n in found)
        if name not in means and not _is_group(rows, name)
    ]
    categories: dict[str, list[str]] = {}
    for name in names:
        categories.setdefault(_category(rows, name), []).append(name)

    def score(row: Row, task: str) -> float | None:
        found = row.mean(lambda run: scores[id(run)].get(task))
        return found and found.value

    by_category = _by_category(group, rows, means, categories, scores, mark)
    return [by_category, _by_task(rows, categories, score, mark)]


def _scores(run: Run) -> dict[str, float]:
    """Accuracy by task, and the mean by group, of a run's last evaluation."""
    found: dict[str, float] = {}
    for results in run.evaluations:
        found |= {name.removeprefix("eval/"): x for name, x in metrics(results).items()}
    return found


def _results_with(run: Run, task: str) -> dict[str, Any] | None:
    """The newest of a run's results that has the task."""
    return next((r for r in reversed(run.evaluations) if task in r["results"]), None)


def _is_group(rows: list[Row], name: str) -> bool:
    return any(
        name in results.get("group_subtasks", {})
        for row in rows
        for run in row.finished
        for results in run.evaluations
    )


def _means_of_groups(rows: list[Row]) -> list[str]:
    """Groups that have a mean, such as CORE."""
    return list(dict.fromkeys(
        name
        for row in rows
        for run in row.finished
        for results in run.evaluations
        for name in results.get("group_subtasks", {})
        if aggregate_metric(results, name)
    ))  # fmt: skip


def _category(rows: list[Row], task: str) -> str:
    """The folder of the task's file, which is what DCLM calls its category."""
    for row in rows:
        for run in row.finished:
            results = _results_with(run, task) or {}
            about = (results.get("configs", {}).get(task, {}).get("metadata") or {}).get("file")
            if about and len(parts := PurePosixPath(str(about)).parts) > 1:
                return parts[-2].replace("_", " ")
    return OTHER


def _estimate(interval: Interval) -> Estimate:
    return Estimate(interval.value, interval.low, interval.high)


def _group_mean(row: Row, name: str) -> Estimate | None:
    """Over seeds; for one run the interval comes from resampling its rows."""
    over_seeds = row.mean(lambda run: _scores(run).get(name))
    if over_seeds is None or over_seeds.has_interval:
        return over_seeds
    results = next(r for run in row.finished if (r := _results_with(run, name)))
    interval = group_interval(results, name)
    return over_seeds if interval is None else _estimate(interval)


def _group_difference(row: Row, base: Row, name: str) -> Estimate | None:
    """Paired over seeds; for one common seed over the rows that both scored."""
    over_seeds = row.minus(base, lambda run: _scores(run).get(name))
    if over_seeds is None or over_seeds.has_interval:
        return over_seeds
    ours, theirs = (
        {run.seed: r for run in x.finished if (r := _results_with(run, name))} for x in (row, base)
    )
    for seed in ours.keys() & theirs.keys():
        if pairs := group_pairs(ours[seed], theirs[seed], name):
            return _estimate(bootstrap(pairs))
    return over_seeds


def _by_category(
    group: Group,
    rows: list[Row],
    means: list[str],
    categories: dict[str, list[str]],
    scores: dict[int, dict[str, float]],
    mark: str,
) -> Table:
    base = group.baseline
    with_paper = [m for m in means if any(published_benchmark(row, m) is not None for row in rows)]
    columns = [Column("values"), Column("seeds", "d")]
    for name in means:
        columns.append(Column(name, ".4f", estimates=True))
        columns.append(Column(f"{name} difference to {base.label}", "+.4f", estimates=True))
        columns += [Column(f"paper {name}", ".3f")] * (name in with_paper)
    columns += [Column(name, ".3f") for name in categories]
    lines: list[list[Cell]] = []
    for row in rows:
        line: list[Cell] = [row.label, len({run.seed for run in row.finished})]
        for name in means:
            line += [_group_mean(row, name), _group_difference(row, base, name)]
            line += [published_benchmark(row, name)] * (name in with_paper)
        for tasks in categories.values():

            def accuracy(run: Run, tasks: list[str] = tasks) -> float | None:
                found = scores[id(run)]
                return (
                    float(np.mean([found[t] for t in tasks]))
                    if all(t in found for t in tasks)
                    else None
                )

            found = row.mean(accuracy)
            line.append(found and found.value)
        lines.append(line)
    text = ["Categories: mean accuracy of their tasks."]
    text += [f"{name} is {PROTOCOLS[name]}: the mean of centred accuracies." for name in means
             if name in PROTOCOLS]  # fmt: skip
    if means:
        text.append(
            "Intervals are over seeds (t distribution, paired differences); of a single run, over "
            "resampled rows."
        )
    if any(name in PROTOCOLS for name in means):
        text.append(f"{NOISE[0].upper()}{NOISE[1:]}.")
    return Table(f"benchmarks_by_category{mark}", "Benchmarks by category", columns, lines,
                 " ".join([*text, *_how_evaluated(rows)]))  # fmt: skip


def _how_evaluated(rows: list[Row]) -> list[str]:
    """What differs between evaluations, or cuts them short."""
    sizes: dict[str, list[str]] = {}
    cut: dict[str, list[str]] = {}
    for row in rows:
        for run in row.finished:
            for results in run.evaluations:
                extra = results["evaluation"]
                limit = extra["settings"].get("max_per_task")
                sizes.setdefault("all" if limit is None else str(limit), []).append(run.name)
                for note in notes(results):
                    cut.setdefault(note.removeprefix("note: "), []).append(run.name)
                if extra.get("step") not in (None, run.step):
                    cut.setdefault(f"evaluated at step {extra['step']}", []).append(run.name)
    lines = []
    if len(sizes) > 1:
        each = "; ".join(f"{n} in {', '.join(dict.fromkeys(r))}" for n, r in sizes.items())
        lines.append(f"Not equally many rows per task were scored: {each}.")
    lines += [f"{', '.join(dict.fromkeys(names))}: {note}." for note, names in cut.items()]
    return lines


def _by_task(
    rows: list[Row],
    categories: dict[str, list[str]],
    score: Callable[[Row, str], float | None],
    mark: str,
) -> Table:
    paper = [
        row
        for row in rows
        if any(
            published_benchmark(row, t) is not None for tasks in categories.values() for t in tasks
        )
    ]
    columns = [
        Column("task"),
        Column("category"),
        *(Column(row.label, ".3f") for row in rows),
        *(Column(f"paper {row.value_name}", ".2f") for row in paper),
    ]
    lines: list[list[Cell]] = [
        [
            task.removeprefix("core_"),
            category,
            *(score(row, task) for row in rows),
            *(published_benchmark(row, task) for row in paper),
        ]
        for category, tasks in categories.items()
        for task in tasks
    ]
    note = "Accuracy, mean over seeds."
    return Table(f"benchmarks_by_task{mark}", "Benchmarks by task", columns, lines, note)
