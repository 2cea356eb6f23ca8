"""Ladders for tests: results of the preregistered one, made up, and a tiny one to train."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from conftest import REPOSITORY

from bov_lightning.recipe.ladder import Ladder, read_ladder
from bov_lightning.report.effective_compute import through
from bov_lightning.report.ladder_results import Result

FILE = REPOSITORY / "docs" / "results" / "ladder" / "ladder.yaml"
"""The one that is preregistered."""
LAW = through((3e12, 2.0), (1e14, 1.65), 0.9)


def ladder(path: Path = FILE) -> Ladder:
    return read_ladder(path)


def result(of: Ladder, rung: str, arm: str, seed: int, val_bpb: float, **changes) -> Result:
    """A run that was not run."""
    rates = changes.pop("rates", 1.0), changes.pop("table_rates", 1.0)
    kind = changes.get("kind", "rung")
    name = f"{of.name}-{rung}-{arm}-{kind}{rates[0]}-{rates[1]}-seed{seed}"
    values = {
        "run": name, "kind": kind, "rung": rung, "arm": arm, "seed": seed, "rates": rates[0],
        "table_rates": rates[1], "val_bpb": val_bpb, "train_bpb": val_bpb - 0.05, "steps": 10,
        "tokens": 1000, "epochs": 0.5, "flops": of.rung(rung).flops, "parameters": 100,
        "tables": 0, "train_seconds": 1.0, "seconds": 1.0, "device": "cpu", "precision": "32-true",
        "text": "t", "tokenizer": "k", "val_rows": "v", "val_tokens": "all", "recipe": "r",
        "ladder": of.digest, "commit": "c",
    }  # fmt: skip
    return Result(**values | changes)


def results(
    of: Ladder, multipliers: dict[str, float], random, rungs: Sequence[str] | None = None,
    tuned: dict[str, float] | None = None, shared: float = 0.003, own: float = 0.0015,
) -> list[Result]:  # fmt: skip
    """All runs of the file on rungs that a verdict needs, of arms that are so much better than a
    curve; with the noise of seeds that they share, and their own.

    Args:
        of: the file.
        multipliers: by arm; others are not there.
        random: numpy's.
        rungs: on which; None: all that are not optional.
        tuned: by arm, the multiplier at the best rates of the runs that tune; as ``multipliers`` if
            not given.
        shared: standard deviation of what runs of one seed have in common.
        own: of the rest.
    """
    found = []
    rungs = rungs or [rung.name for rung in of.rungs if not rung.optional]
    for name in rungs:
        flops = of.rung(name).flops
        common = random.normal(0, shared, 10)
        for arm, m in multipliers.items():
            for seed in of.seeds(arm, name):
                loss = LAW.loss(m * flops) + common[seed] + random.normal(0, own)
                found.append(result(of, name, arm, seed, loss))
        if of.tuning is None or name not in of.tuning.rungs:
            continue
        for arm in of.tuning.arms:
            m = multipliers[arm]
            best = (tuned or multipliers)[arm]
            for factor in of.tuning.factors:
                loss = LAW.loss((best if factor != 1 else m) * flops) + 0.02 * (factor != 1)
                loss = loss - 0.02 * (factor == 2) if best != m else loss
                found.append(result(of, name, arm, 0, loss, rates=factor, kind="tuning"))
            for factor in of.tuning.table_factors:
                found.append(result(of, name, arm, 0, LAW.loss(m * flops) + 0.02,
                                    table_rates=factor, kind="tuning"))  # fmt: skip
    return found


CONDITION = {"number": 1.0, "against": ["standard"]}
TINY = {
    "name": "small",
    "recipe": "tiny.yaml",
    "hypothesis": "A bank is better.",
    "baseline": "standard",
    "precision": {"cpu": "32-true"},
    "settings": {"checkpoint": {"every_steps": 2, "keep_last": 1}},
    "rungs": [
        {"name": "low", "flops": 4e8, "batch": 256, "micro": 4, "config": {"d_model": 32}},
        {"name": "high", "flops": 8e8, "batch": 256, "micro": 4, "config": {"d_model": 48}},
    ],
    "arms": [
        {"values": "standard", "seeds": [1, 1]},
        {"values": "bov", "seeds": [1, 1], "rates_of": "standard"},
    ],
    "tuning": {
        "rungs": ["low"], "arms": ["standard"], "rates": ["matrix_lr", "table_lr"],
        "factors": [0.5, 1, 2], "table_factors": [], "limits": [0.5, 2], "check": "high",
    },
    "speed": {"rungs": ["low"], "rounds": 2},
    "verdict": {
        "arm": "bov",
        "supported": [{"rule": "multiplier_above", **CONDITION}],
        "refuted": [{"rule": "multiplier_at_most", **CONDITION, "rungs": "top"}],
    },
}  # fmt: skip
NAMES = [
    *(f"small-low-standard-rates{factor}-seed0" for factor in ("0.5", "1", "2")),
    "small-low-standard-seed0", "small-low-bov-seed0", "small-high-standard-check-seed0",
    "small-high-standard-seed0", "small-high-bov-seed0",
]  # fmt: skip


def write(folder: Path, **changes) -> Path:
    """The tiny ladder, with other values for some of its keys."""
    path = folder / "ladder.yaml"
    path.write_text(yaml.safe_dump(TINY | changes, sort_keys=False))
    return path
