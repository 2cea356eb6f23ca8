"""Which runs may share an axis, and which are one row of a table but for their seed."""

import difflib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import yaml

from bov_lightning.errors import UserError
from bov_lightning.recipe.keys import defaults
from bov_lightning.recipe.overlays import packaged_recipes
from bov_lightning.report.reading import Run, flatten, printable, section
from bov_lightning.report.statistics import Estimate, difference, mean

VALUE = "model.config.value"
D_MLP = "model.config.d_mlp"
NOT_THE_RECIPE = (
    "seed", "run", "checkpoint", "validation", "evaluation", "guard", "resume", "compile",
    "activation_checkpointing", "batch.micro", "trainer", "data.init_args.directory",
    "data.init_args.source", "data.init_args.n_shard",
)  # fmt: skip
"""Keys that change nothing about what is learned, or that a fingerprint stands for."""
BUT = ("trainer.precision",)


@dataclass(frozen=True)
class Row:
    """Runs that differ by nothing but their seed."""

    label: str
    index: int
    """Decides its colour and dashes, the same in all plots of its group."""
    runs: list[Run]
    """All of them."""

    @property
    def finished(self) -> list[Run]:
        """Those whose last number is a result."""
        return [run for run in self.runs if run.unfinished is None]

    @property
    def first(self) -> Run:
        """One of them, for what all have in common."""
        return self.runs[0]

    def by_seed(self, number: Callable[[Run], float | None]) -> dict[int, float]:
        """A number of the finished runs by seed; the mean where a seed ran twice."""
        found: dict[int, list[float]] = {}
        for run in self.finished:
            value = number(run)
            if value is not None and np.isfinite(value):
                found.setdefault(run.seed, []).append(value)
        return {seed: float(np.mean(values)) for seed, values in found.items()}

    def mean(self, number: Callable[[Run], float | None]) -> Estimate | None:
        """The mean over seeds; None where no finished run has the number."""
        found = self.by_seed(number)
        return mean(list(found.values())) if found else None

    def minus(self, other: "Row", number: Callable[[Run], float | None]) -> Estimate | None:
        """The difference to another row; None to itself or where one has no number."""
        ours, theirs = self.by_seed(number), other.by_seed(number)
        return difference(ours, theirs) if ours and theirs and self is not other else None

    @cached_property
    def value_name(self) -> str | None:
        """The overlay in recipes/values that it is; None where it is none of them."""
        return value_name(self.first.value, self.first.d_mlp)


@dataclass(frozen=True)
class Group:
    """Rows whose bits per byte can be compared."""

    rows: list[Row]
    baseline: Row
    data: dict[str, str]
    """What they were measured on."""

    @property
    def runs(self) -> list[Run]:
        """All runs of all rows."""
        return [run for row in self.rows for run in row.runs]

    @property
    def finished(self) -> list[Row]:
        """Rows that have a result."""
        return [row for row in self.rows if row.finished]


def compare(runs: list[Run], baseline: str | None) -> list[Group]:
    """Groups of comparable rows, in the order of the runs.

    Raises:
        UserError: no run or row is called ``baseline``.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(_measured_on(run).items()), []).append(run)
    made = []
    for key, members in groups.items():
        rows = _rows(members)
        made.append(Group(rows, _baseline(rows, baseline), dict(key)))
    known = [name for group in made for row in group.rows for name in (row.label, *_names(row))]
    if baseline is not None and made and baseline not in known:
        close = difflib.get_close_matches(baseline, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(dict.fromkeys(known))}"
        raise UserError(f"--baseline {baseline} is no run and no row of this report: {hint}")
    return made


def _names(row: Row) -> list[str]:
    return [run.name for run in row.runs]


def _baseline(rows: list[Row], name: str | None) -> Row:
    """The named row, or the first one that has a result."""
    named = [row for row in rows if name in (row.label, *_names(row))]
    return next(iter([*named, *(row for row in rows if row.finished), *rows]))


def _measured_on(run: Run) -> dict[str, str]:
    """Everything that must be the same for two numbers of bits per byte to be comparable."""
    known = {"tokenizer", "val_rows"} <= run.data.keys()
    tokens = run.settings.get("validation.tokens")
    return {
        "tokenizer": run.data.get("tokenizer", "unknown"),
        "held-out rows": run.data.get("val_rows", "unknown"),
        "validation tokens": "all" if tokens is None else printable(str(tokens)),
        **({} if known else {"run": run.name}),
    }


def _is_recipe(key: str) -> bool:
    def below(prefixes: tuple[str, ...]) -> bool:
        return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)

    return below(BUT) or not below(NOT_THE_RECIPE)


def _recipe_of(run: Run) -> dict[str, Any]:
    recipe = {key: value for key, value in run.settings.items() if _is_recipe(key)}
    return {**recipe, "training text": run.data.get("source")}


def _rows(runs: list[Run]) -> list[Row]:
    rows: dict[tuple, list[Run]] = {}
    for run in runs:
        key = tuple(sorted((k, repr(v)) for k, v in _recipe_of(run).items()))
        rows.setdefault(key, []).append(run)
    members = list(rows.values())
    labels = _labels([m[0] for m in members])
    return [
        Row(printable(label), i, m)
        for i, (label, m) in enumerate(zip(labels, members, strict=True))
    ]


def _labels(runs: list[Run]) -> list[str]:
    """The name of the values, and what else tells rows of one name apart."""
    names = [
        value_name(run.value, run.d_mlp) or value_name(run.value) or describe(run.value)
        for run in runs
    ]
    recipes = [_recipe_of(run) for run in runs]
    labels = []
    for run, name, recipe in zip(runs, names, recipes, strict=True):
        others = [r for n, r in zip(names, recipes, strict=True) if n == name and r is not recipe]
        known = dict.fromkeys(key for each in (recipe, *others) for key in each)
        keys = [
            key
            for key in known
            if not key.startswith(VALUE) and any(recipe.get(key) != r.get(key) for r in others)
        ]
        if len(keys) > 3:
            labels.append(f"{name} ({run.name})")
            continue
        told = ", ".join(f"{key.rpartition('.')[2]} {_short(recipe.get(key))}" for key in keys)
        labels.append(f"{name} ({told})" if told else name)
    double = {label for label, n in Counter(labels).items() if n > 1}
    return [
        f"{label} ({run.name})" if label in double else label
        for label, run in zip(labels, runs, strict=True)
    ]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_OVERLAYS: dict[str, tuple[dict[str, Any], int | str | None]] = {}


def _overlays() -> dict[str, tuple[dict[str, Any], int | str | None]]:
    """The value section and ``d_mlp`` of every overlay in recipes/values."""
    if not _OVERLAYS:
        for path in sorted((packaged_recipes() / "values").glob("*.yaml")):
            overlay = flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
            _OVERLAYS[path.stem] = _whole(section(overlay, VALUE)), overlay.get(D_MLP)
    return _OVERLAYS


def _whole(value: dict[str, Any]) -> dict[str, Any]:
    """A value section with every key that it leaves out, but for settings of its source."""
    return section(flatten(defaults()), VALUE) | value


def value_name(value: dict[str, Any], d_mlp: int | str | None = None) -> str | None:
    """The overlay in recipes/values with these values; None where there is none.

    Args:
        value: the value section.
        d_mlp: ``model.config.d_mlp``, which sets a control apart.
    """
    if value.get("source") == "context" and value.get("coefficient") == 1:
        # Whatever layers it names.
        value = _overlays()["standard"][0]
    value = _whole(value)
    return next((name for name, known in _overlays().items() if known == (value, d_mlp)), None)


def describe(value: dict[str, Any]) -> str:
    """A value section that no overlay has, in a few words."""
    layers, usual = str(value.get("layers")).replace("_", " "), _whole({})
    parts = [
        str(value.get("source")).replace("_", " "),
        f"layers {layers.strip('[]')}" if layers.startswith("[") else layers,
        f"coefficient {_short(value.get('coefficient'))}",
        "plus context" if value.get("add_context") else "",
        "shared" if value.get("shared") else "",
        *(
            f"{key.removeprefix('source_args.').replace('_', ' ')} {_short(found)}"
            for key, found in value.items()
            if key.startswith("source_args.") or (key.startswith("gate_") and usual[key] != found)
        ),
    ]
    return ", ".join(filter(None, parts))
