"""What a resumed run must not change."""

import dataclasses
from typing import Any

FIXED_BY_RUN = ("model.config", "model.optimizer", "batch.tokens", "seed", "data")
"""Keys and sections."""

FREE = tuple(
    f"data.init_args.{name}"
    for name in (
        "on_error", "n_worker", "directory", "num_workers", "prefetch_factor", "pin_memory",
        "persistent_workers",
    )
)  # fmt: skip
"""Keys of those that no row which a run has seen depends on: how it is read, what becomes of rows
that cannot be read, and where prepared rows lie, which are compared by their content."""


def plain(value: Any) -> Any:
    """A section as plain data; anything else as it is."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def part_of(data: Any, key: str) -> Any:
    """What lies at a dotted key; None where there is nothing."""
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def first_difference(old: Any, new: Any, key: str) -> tuple[str, Any, Any] | None:
    """(dotted key, old value, new value) where they differ first; keys of ``new`` alone are fine:

    they came with a newer version.
    """
    if key in FREE:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old:
            if found := first_difference(old.get(name), new.get(name), f"{key}.{name}"):
                return found
        return None
    return None if old == new else (key, old, new)


def fixed_difference(old: dict, new: dict) -> tuple[str, Any, Any] | None:
    """`first_difference` of two recipes in what a run fixes."""
    found = (first_difference(part_of(old, key), part_of(new, key), key) for key in FIXED_BY_RUN)
    return next(filter(None, found), None)
