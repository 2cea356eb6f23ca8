"""The paper's numbers, for rows whose recipe is the paper's."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from bov_lightning.report.comparison import Row
from bov_lightning.report.effective_compute import through


@cache
def _published() -> list[dict[str, Any]]:
    text = Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def published(row: Row) -> dict[str, Any] | None:
    """The entry of published.yaml whose model, batch and budget the row has; None otherwise."""
    settings = row.first.settings
    for entry in _published():
        if all(settings.get(key) == value for key, value in entry["recipe"].items()):
            return entry
    return None


def published_bpb(row: Row) -> float | None:
    """The paper's bits per byte for the row's values."""
    entry = published(row)
    return entry and entry["val_bpb"].get(row.value_name)


def published_benchmark(row: Row, task: str) -> float | None:
    """The paper's accuracy (CORE for a group) for the row's values."""
    entry = published(row)
    return entry and entry.get("benchmarks", {}).get(task, {}).get(row.value_name)


def published_multipliers(floor: float) -> dict[str, dict[str, float]]:
    """Compute multipliers of the authors' sweep of starts, by size and overlay.

    Two sizes of the baseline cannot tell the curve's E, so it is given, in bits per byte.
    """
    sizes = {
        entry["name"]: (float(entry["recipe"]["model.budget.flops"]), entry["starts"])
        for entry in _published()
    }
    low, high = ((flops, losses["standard"]) for flops, losses in sizes.values())
    law = through(low, high, floor)
    return {
        size: {
            name: law.multiplier(losses["standard"], loss)
            for name, loss in losses.items() if name != "standard"
        }
        for size, (_, losses) in sizes.items()
    }  # fmt: skip
