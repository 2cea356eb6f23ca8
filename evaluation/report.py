"""Tables of results, and how sure they are.

All intervals come from resampling rows. A row takes few distinct values (right or wrong), so that a
resample of n rows is a multinomial draw over these: exact, and cheap for 10,000 rows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.results import metrics

N_RESAMPLE = 10_000
SEED = 0
LEVEL = (2.5, 97.5)
PROTOCOLS = {
    "core_paper": "per byte, v1 baselines, as in the paper",
    "core_dclm_v1": "per token, v1 baselines",
    "core_dclm_v2": "per token, baselines corrected in 2025",
}
Line = tuple[list[str], str]
"""Cells and a remark."""
HEAD = ["task", "shots", "rows", "accuracy", "stderr", "chance", "centred"]
WIDTHS = (33, 5, 6, 9, 7, 7, 8)
DIFFERENCE_WIDTHS = (33, 7, 11)
NOISE = (
    "CORE differs between runs of one recipe by more than the paper's gain: a difference within "
    "one pair of runs is about these two runs, not about their recipes"
)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval over rows."""

    value: float
    low: float
    high: float
    p_positive: float = float("nan")
    """Share of the resamples above zero."""

    def __str__(self) -> str:
        return f"{self.value:.4f}  [{self.low:.4f}, {self.high:.4f}]"


def _resampled_means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of N_RESAMPLE resamples of the values."""
    distinct, counts = np.unique(values, return_counts=True)
    drawn = generator.multinomial(len(values), counts / len(values), size=N_RESAMPLE)
    return drawn @ distinct / len(values)


def bootstrap(rows_of_tasks: list[np.ndarray]) -> Interval:
    """The mean over tasks of their mean row, resampling rows within each task."""
    generator = np.random.default_rng(SEED)
    means = np.mean([_resampled_means(rows, generator) for rows in rows_of_tasks], axis=0)
    low, high = np.percentile(means, LEVEL)
    value = float(np.mean([rows.mean() for rows in rows_of_tasks]))
    return Interval(value, float(low), float(high), float((means > 0).mean()))


def aggregate_metric(results: dict[str, Any], group: str) -> str | None:
    """The metric that a group averages over its tasks; None where it only lists them."""
    values = results.get("groups", {}).get(group, {})
    return next((k.partition(",")[0] for k in values if "," in k and "_stderr" not in k), None)


def leaf_tasks(results: dict[str, Any], group: str) -> list[str]:
    """All tasks below a group."""
    names = []
    for child in results.get("group_subtasks", {}).get(group, []):
        is_group = child in results["group_subtasks"]
        names += leaf_tasks(results, child) if is_group else [child]
    return names


def row_values(results: dict[str, Any], task: str, metric: str) -> dict[int, float]:
    """The metric of every scored row of a task, by row."""
    return {
        sample["doc_id"]: float(sample[metric])
        for sample in results["samples"].get(task, [])
        if isinstance(sample.get(metric), float | int)
    }


def group_interval(results: dict[str, Any], group: str) -> Interval | None:
    """The mean of a group that has one and rows in all of its tasks; None otherwise."""
    metric = aggregate_metric(results, group)
    if metric is None:
        return None
    rows = [list(row_values(results, t, metric).values()) for t in leaf_tasks(results, group)]
    if not rows or not all(rows):
        return None
    return bootstrap([np.array(r) for r in rows])


def table(results: dict[str, Any]) -> str:
    """What `bov evaluate` prints."""
    groups = results.get("groups", {})
    rows: list[Line] = [(HEAD, "")]
    for name, values in results["results"].items():
        # lm-eval lists groups among the tasks, those that have no mean too.
        if name in groups or results.get("group_subtasks", {}).get(name):
            continue
        rows += _task_rows(name, values, results)
    lines, first = columns(rows)
    for group in groups:
        interval = group_interval(results, group)
        if interval is None:
            lines.append(f"{group}: not all of its tasks have rows, so it has no mean")
            continue
        about = PROTOCOLS.get(group)
        lines.append(f"{group:<{first}} {interval}" + (f"  ({about})" if about else ""))
    return "\n".join([*lines, *notes(results)])


def columns(rows: list[Line], widths: tuple[int, ...] = WIDTHS) -> tuple[list[str], int]:
    """Lines of text: the first column to the left, others to the right, a space between any two.

    Args:
        rows: the cells of each line, and a remark at its end.
        widths: of the columns; a cell that is wider widens its column.

    Returns:
        The lines, and the width of the first column.
    """
    widest = [
        max(width, *(len(cells[i]) for cells, _ in rows if i < len(cells)), 0)
        for i, width in enumerate(widths)
    ]
    lines = []
    for (first, *others), remark in rows:
        line = f"{first:<{widest[0]}}"
        line += "".join(f" {cell:>{w}}" for cell, w in zip(others, widest[1:], strict=False))
        lines.append(f"{line}  {remark}" if remark else line)
    return lines, widest[0]


def _task_rows(name: str, values: dict[str, Any], results: dict[str, Any]) -> list[Line]:
    shots, n_row = results["n-shot"].get(name, 0), values.get("sample_len", 0)
    shots = results["evaluation"]["fewer_shots"].get(name, shots)
    head = [name, "-" if shots is None else str(shots), str(n_row)]
    baseline = (results["configs"].get(name, {}).get("metadata") or {}).get("baseline")
    if baseline is not None and "acc,none" in values:
        stderr = _number(values.get("acc_stderr,none"))
        centred = f"{values['centered,none']:.4f}"
        cells = [f"{values['acc,none']:.4f}", stderr, f"{baseline['v1']:.3f}", centred]
        return [([*head, *cells], "")]
    rows = []
    for key in (k for k in values if "," in k and "_stderr" not in k):
        metric, _, kind = key.partition(",")
        label = metric if kind == "none" else f"{metric} ({kind})"
        stderr = _number(values.get(f"{metric}_stderr,{kind}"))
        rows.append(([*head, _number(values[key]), stderr], label))
    return rows or [(head, "no rows")]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float | int) else "-"


def notes(results: dict[str, Any]) -> list[str]:
    """What the numbers must not be read without."""
    extra, lines = results["evaluation"], []
    if cropped := extra["cropped_prompts"]:
        each = ", ".join(f"{task} {n}" for task, n in cropped.items())
        lines.append(
            f"note: {sum(cropped.values())} prompts exceed the context of {extra['max_length']} "
            f"tokens; their first tokens were left out ({each})"
        )
    if cut := extra.get("cut_answers"):
        each = ", ".join(f"{task} {n}" for task, n in cut.items())
        lines.append(
            f"note: {sum(cut.values())} answers ended where the context of {extra['max_length']} "
            f"tokens does, before the length that the task allows ({each})"
        )
    lines += [f"note: {note}" for note in extra.get("notes", ())]
    if late := extra["rows_left_out"]:
        each = ", ".join(f"{task} {n}" for task, n in late.items())
        lines.append(f"note: the time limit left rows out ({each})")
    if fewer := extra["fewer_shots"]:
        each = ", ".join(f"{task} {n}" for task, n in fewer.items())
        lines.append(f"note: fewer shots than the protocol's, for want of rows ({each})")
    return lines


def paired_rows(ours: dict[str, Any], theirs: dict[str, Any], task: str, metric: str) -> np.ndarray:
    """Ours minus theirs for every row of a task that both scored."""
    a, b = (row_values(results, task, metric) for results in (ours, theirs))
    return np.array([a[i] - b[i] for i in sorted(a.keys() & b.keys())])


def group_pairs(ours: dict[str, Any], theirs: dict[str, Any], group: str) -> list[np.ndarray]:
    """`paired_rows` of every task of a group; empty where it has no mean or a task no rows."""
    metric = aggregate_metric(ours, group)
    rows = [paired_rows(ours, theirs, t, metric) for t in leaf_tasks(ours, group)] if metric else []
    return rows if all(map(len, rows)) else []


def compare(ours: dict[str, Any], theirs: dict[str, Any], names: tuple[str, str]) -> str:
    """The paired differences, first minus second, with bootstrap intervals over common rows."""
    rows: list[Line] = [(["", "rows", "difference"], "95% interval        P(> 0)")]
    for task, values in ours["results"].items():
        if task in ours.get("groups", {}):
            continue
        metric = next((k.partition(",")[0] for k in values if "," in k), None)
        if metric is None or not len(pairs := paired_rows(ours, theirs, task, metric)):
            continue
        rows.append(_difference(task, len(pairs), bootstrap([pairs])))
    for group in ours.get("groups", {}):
        if pairs := group_pairs(ours, theirs, group):
            rows.append(_difference(group, sum(map(len, pairs)), bootstrap(pairs)))
    lines = [f"{names[0]} minus {names[1]}, paired by row", *columns(rows, DIFFERENCE_WIDTHS)[0]]
    if any(group in PROTOCOLS for group in ours.get("groups", {})):
        lines.append(f"note: {NOISE}")
    return "\n".join(lines)


def headline(results: dict[str, Any]) -> str:
    """The numbers of one evaluation in one line: groups that have a mean, and single tasks."""
    found = metrics(results)
    groups = [g for g in results.get("group_subtasks", {}) if aggregate_metric(results, g)]
    inside = {t for g in groups for t in leaf_tasks(results, g)}
    names = [n for n in found if n.removeprefix("eval/") not in inside]
    return "  ".join(f"{name.removeprefix('eval/')} {found[name]:.4f}" for name in names)


def _difference(name: str, n_row: int, interval: Interval) -> Line:
    span = f"[{interval.low:+.4f}, {interval.high:+.4f}]"
    cells = [name, str(n_row), f"{interval.value:+.4f}"]
    return cells, f"{span}  {interval.p_positive:.3f}"
