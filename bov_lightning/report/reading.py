"""Run directories as plain data.

A run may come from anybody: YAML, JSON, CSV and safetensors are read without running code, and
what is wrong with a run becomes a sentence in the report.
"""

import csv
import json
import math
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bov_lightning.checkpoint.directory import CONFIG, WEIGHTS, complete_checkpoints
from bov_lightning.errors import UserError
from bov_lightning.recipe.keys import defaults
from bov_lightning.recipe.yaml_text import parse_yaml
from bov_lightning.run.directory import EVAL, RunDirectory
from bov_lightning.text import NoTextError, decode, lines
from evaluation.report import aggregate_metric, leaf_tasks, notes
from evaluation.results import read_results

COLUMNS = ("tokens", "train_loss", "val_bpb", "train_seconds", "tokens_per_s", "mfu")
COUNT_LIMIT = 2**62
"""What counts steps, tokens or FLOPs per token is below; products of two are finite."""
MAX_KEYS = 10_000
"""Keys of a recipe, aliases followed: more is an attack, or no recipe."""

COEFFICIENT = re.compile(r"blocks\.(\d+)\.attention\.value\.(coefficient|context_coefficient)")


@dataclass(frozen=True)
class Unusable:
    """A run that no number can be taken from."""

    name: str
    reason: str


@dataclass(frozen=True)
class Run:
    """What a run directory says."""

    path: Path
    name: str
    settings: dict[str, Any]
    """The resolved recipe by dotted key."""
    facts: dict[str, Any]
    """run.json."""
    metrics: dict[str, np.ndarray]
    """metrics.csv by column, float64; NaN where a row has no value. step and tokens have all."""
    notes: list[str] = field(default_factory=list)
    """What is missing or damaged without making the run useless."""

    @property
    def seed(self) -> int | None:
        """Of initialisation and data order."""
        return self.settings.get("seed")

    @property
    def value(self) -> dict[str, Any]:
        """The value section of the model."""
        return section(self.settings, "model.config.value")

    @property
    def d_mlp(self) -> int | str | None:
        """What the recipe says of the MLPs' width."""
        return self.settings.get("model.config.d_mlp")

    @property
    def data(self) -> dict[str, str]:
        """Fingerprints of text, tokenizer and held-out rows."""
        return self.facts["data"]

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return int(self.metrics["step"][-1])

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return int(self.metrics["tokens"][-1])

    @property
    def flops(self) -> float:
        """FLOPs of training so far."""
        return float(self.tokens * self.facts["flops_per_token"])

    @property
    def train_seconds(self) -> float:
        """Seconds of training, without validation and saving; NaN where the run did not count."""
        counted = self.metrics["train_seconds"]
        return float(np.nanmax(counted)) if np.isfinite(counted).any() else math.nan

    @property
    def device_hours(self) -> float:
        """Hours of training on all devices together."""
        return self.train_seconds * self.facts["world_size"] / 3600

    @property
    def val_bpb(self) -> float:
        """Bits per byte at the last step; NaN where there are none."""
        return float(self.metrics["val_bpb"][-1])

    @cached_property
    def ended(self) -> str | None:
        """What ended it before the last step of its budget; None: nothing."""
        found = RunDirectory(self.path).ended()
        if found is None or found.step != self.step:
            return None
        by = printable(one_line(found.by))
        return f"ended early by {by}: step {found.step:,} of {self.facts['iterations']:,}"

    @property
    def unfinished(self) -> str | None:
        """Why its last number is no result; None: it is one."""
        if self.ended is None and self.step < self.facts["iterations"]:
            measured = np.flatnonzero(np.isfinite(self.metrics["val_bpb"]))
            last = ""
            if len(measured):
                at = measured[-1]
                last = (f"; val_bpb {self.metrics['val_bpb'][at]:.4f} "
                        f"at step {int(self.metrics['step'][at]):,}")  # fmt: skip
            return f"unfinished: step {self.step:,} of {self.facts['iterations']:,}{last}"
        if not math.isfinite(self.val_bpb):
            return f"no usable val_bpb at its last step, {self.step:,}"
        return None

    @cached_property
    def coefficients(self) -> dict[str, dict[int, float]]:
        """Learned scalars by name and layer, of the newest complete checkpoint."""
        found: dict[str, dict[int, float]] = {}
        try:
            for checkpoint in complete_checkpoints(self.path)[-1:]:
                for file in sorted((checkpoint / WEIGHTS).glob("*.safetensors")):
                    for layer, name, value in _scalars(file):
                        found.setdefault(name, {})[layer] = value
        except Exception as error:
            # Whatever a damaged or a stranger's file provokes.
            self.notes.append(f"coefficients cannot be read: {one_line(error)}")
        return found

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """lm-eval's results at the last evaluated step, oldest first, with ``samples``."""
        try:
            for folder in sorted((self.path / EVAL).glob("step-*"), reverse=True):
                if found := read_results(folder):
                    return [_with_samples(results) for results in found]
        except Exception as error:
            self.notes.append(f"evaluations cannot be read: {one_line(error)}")
        return []


def one_line(error: object) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def section(settings: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The keys below a dotted prefix, without it."""
    start = prefix + "."
    return {k.removeprefix(start): v for k, v in settings.items() if k.startswith(start)}


def read_runs(paths: list[Path]) -> tuple[list[Run], list[Unusable]]:
    """All runs at the paths in that order, each once, and those that cannot be used.

    Raises:
        UserError: a path that is no directory, or no path at all.
    """
    if not paths:
        raise UserError("give at least one run directory, such as runs/quickstart")
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path} is no run directory: it does not exist, or is a file")
        for folder in _run_folders(path):
            folders.setdefault(folder.resolve(), folder)
    names = _names(list(folders))
    usable, unusable = [], []
    for folder in folders:
        try:
            usable.append(read_run(folder, names[folder]))
        except (UserError, OSError) as error:
            unusable.append(Unusable(names[folder], printable(one_line(error))))
    return usable, unusable


def _run_folders(path: Path) -> list[Path]:
    """The directory itself, or those inside that look like runs where it does not."""

    def is_run(folder: Path) -> bool:
        run = RunDirectory(folder)
        traces = (run.config, run.facts_file, run.metrics_file, folder / "checkpoints")
        return any(trace.exists() for trace in traces)

    inside = [] if is_run(path) else sorted(p for p in path.iterdir() if p.is_dir() and is_run(p))
    return inside or [path]


def _names(folders: list[Path]) -> dict[Path, str]:
    """Directory names, with as many parents as tell them apart; printable."""
    n_part = dict.fromkeys(folders, 1)
    while True:
        names = {path: "/".join(path.parts[-n:]) for path, n in n_part.items()}
        taken = list(names.values())
        same = [p for p, name in names.items() if taken.count(name) > 1]
        if not same:
            break
        for path in same:
            n_part[path] += 1
    return {path: printable(name) for path, name in names.items()}


def printable(name: str) -> str:
    """A file name as text: what no character set or no XML has becomes a question mark."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)


def read_run(path: Path, name: str) -> Run:
    """A run directory; a `UserError` says why it cannot be used."""
    if not any(path.iterdir()):
        raise UserError("the directory is empty")
    run = RunDirectory(path)
    settings = _read_settings(run.config)
    facts = _read_facts(run.facts_file)
    batch = settings.get("batch.tokens")
    if not _is_count(batch):
        raise UserError(f"{CONFIG}: batch.tokens is {batch!r}, not a count")
    metrics, notes = read_metrics(run.metrics_file, batch)
    found = Run(path, name, settings, facts, metrics, notes)
    if found.ended:
        notes.append(found.ended)
    return found


def _read_text(path: Path) -> str:
    try:
        return decode(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path.name} is missing") from None
    except (OSError, NoTextError) as error:
        raise UserError(f"{path.name} cannot be read: {one_line(error)}") from error


def _read_settings(path: Path) -> dict[str, Any]:
    content = parse_yaml(_read_text(path), path.name)
    try:
        settings = flatten(content)
    except UserError as error:
        raise UserError(f"{path.name} cannot be read: {one_line(error)}") from error
    for key in ("model.config.n_layer", "model.config.value.source"):
        if key not in settings:
            raise UserError(f"{path.name} is no resolved recipe: it lacks {key}")
    # A run of before a key was there did what the key's default does.
    return flatten(defaults()) | settings


def flatten(data: Any) -> dict[str, Any]:
    """A nested mapping by dotted key; lists become text.

    Raises:
        UserError: more keys than a recipe has, or no mapping.
    """
    if not isinstance(data, dict):
        raise UserError("its top level is no mapping of keys")
    flat: dict[str, Any] = {}
    pending = [(str(key), value) for key, value in reversed(data.items())]
    n_seen = 0
    while pending:
        key, value = pending.pop()
        n_seen += 1
        if n_seen > MAX_KEYS:
            raise UserError(f"it has more than {MAX_KEYS:,} keys")
        if isinstance(value, dict):
            pending += [(f"{key}.{name}", item) for name, item in reversed(value.items())]
        elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            pending += [(f"{key}.{i}", item) for i, item in reversed(list(enumerate(value)))]
        else:
            flat[key] = str(value) if isinstance(value, list) else value
    return flat


def _read_facts(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is no JSON: {one_line(error)}") from error
    if not isinstance(facts, dict):
        raise UserError(f"{path.name} is no JSON object")
    for name, kind in (("params", dict), ("data", dict), ("cache", dict)):
        if not isinstance(facts.get(name), kind):
            raise UserError(f"{path.name} lacks {name}")
    numbers = [(facts, name) for name in ("world_size", "flops_per_token", "iterations")]
    numbers += [(facts["params"], name) for name in ("live", "tables", "baseline")]
    numbers += [(facts["cache"], name) for name in ("bytes_per_token", "bytes_per_token_standard")]
    for mapping, name in numbers:
        value = mapping.get(name)
        if not _is_count(value):
            raise UserError(f"{path.name}: {name} is {one_line(value)[:40]!r}, not a count")
    facts["data"] = {str(name): printable(str(value)) for name, value in facts["data"].items()}
    return facts


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < COUNT_LIMIT


def read_metrics(path: Path, batch_tokens: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns of a metrics.csv, and what is odd about it.

    A last line that was cut off is left out; any other damage is a `UserError`. Rows without tokens
    get what their step trained on.
    """
    text, notes = _read_text(path), []
    if text and not text.endswith("\n"):
        text, notes = text[: text.rfind("\n") + 1], [f"the last line of {path.name} is cut off"]
    try:
        header, *rows = csv.reader(lines(text, keep_ends=True)) or [[]]
    except (csv.Error, ValueError) as error:
        raise UserError(
            f"{path.name} cannot be read: {one_line(error)}" if text else f"{path.name} is empty"
        ) from error
    if "step" not in header:
        raise UserError(f"{path.name} has no column step")
    if not rows:
        raise UserError(f"{path.name} has no rows: no step was logged")
    for line, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise UserError(
                f"{path.name} line {line} has {len(row)} fields instead of {len(header)}"
            )
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    metrics = {"step": _numbers(path, "step", columns["step"])}
    if not np.isfinite(metrics["step"]).all():
        line = int(np.argmin(np.isfinite(metrics["step"]))) + 2
        raise UserError(f"{path.name} line {line} has no step")
    if (np.diff(metrics["step"]) <= 0).any():
        line = int(np.argmax(np.diff(metrics["step"]) <= 0)) + 3
        raise UserError(f"{path.name} line {line}: its step does not come after the one before")
    for name in COLUMNS:
        values = columns.get(name)
        metrics[name] = (
            np.full(len(rows), math.nan) if values is None else _numbers(path, name, values)
        )
    unknown = ~np.isfinite(metrics["tokens"])
    metrics["tokens"][unknown] = batch_tokens * metrics["step"][unknown]
    for name in ("step", "tokens"):
        if not ((metrics[name] >= 0) & (metrics[name] < COUNT_LIMIT)).all():
            raise UserError(f"{path.name}: {name} is no count in every row")
    return metrics, notes


def _numbers(path: Path, name: str, texts: tuple[str, ...]) -> np.ndarray:
    numbers = np.empty(len(texts))
    for i, text in enumerate(texts):
        try:
            numbers[i] = float(text) if text else math.nan
        except ValueError:
            raise UserError(f"{path.name} line {i + 2}: {name} is {text!r}, no number") from None
    return numbers


def _scalars(file: Path) -> list[tuple[int, str, float]]:
    """(layer, name, value) of the coefficients in a file of safetensors, and nothing else of it."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as stored:
        names = [name for name in stored.keys() if COEFFICIENT.fullmatch(name)]  # noqa: SIM118
        # The other ranks of a sharded run hold empty pieces.
        names = [name for name in names if stored.get_slice(name).get_shape() == [1]]
        narrow = any(stored.get_slice(name).get_dtype() == "BF16" for name in names)
        if not narrow:
            values = [float(stored.get_tensor(name)[0]) for name in names]
    if narrow:
        # numpy knows no bf16.
        with safe_open(file, framework="pt") as stored:
            values = [float(stored.get_tensor(name)[0]) for name in names]
    matches = [COEFFICIENT.fullmatch(name) for name in names]
    return [(int(m[1]), m[2], value) for m, value in zip(matches, values, strict=True)]


def _with_samples(results: dict[str, Any]) -> dict[str, Any]:
    """The results with the rows that intervals of group means need, as `evaluation.report` does.

    Rows keep their number and their numbers: prompts would fill the memory.
    """
    if not isinstance(results["evaluation"]["settings"], dict) or results["configs"] is None:
        raise UserError(f"{results['path']} lacks what bov evaluate writes")
    notes(results)
    path = Path(results["path"])
    date = path.name.removeprefix("results_").removesuffix(".json")
    groups = [g for g in results.get("group_subtasks", {}) if aggregate_metric(results, g)]
    samples = {}
    for task in {t for group in groups for t in leaf_tasks(results, group)}:
        file = path.with_name(f"samples_{task}_{date}.jsonl")
        if file.is_file():
            with open(file, encoding="utf-8") as stored:
                samples[task] = [
                    {
                        "doc_id": row["doc_id"],
                        **{k: v for k, v in row.items() if isinstance(v, int | float)},
                    }
                    for row in map(json.loads, stored)
                ]
    return {**results, "samples": samples}
