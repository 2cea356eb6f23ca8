"""Learning rates for the rungs, from the runs that tried some on the small ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bov_lightning.recipe.ladder import Ladder, LadderRung
from bov_lightning.report.ladder_results import Result

DIGITS = 3
"""After the point, of a factor: so that it can be repeated from what a table shows."""


@dataclass(frozen=True)
class Best:
    """The lowest point of a parabola through losses over the logarithm of a factor."""

    factor: float
    loss: float
    losses: dict[float, float]
    """What was measured, by factor; not finite: it diverged."""


def best_factor(losses: Mapping[float, float]) -> Best:
    """The factor with the lowest loss, between those that were tried.

    Where the parabola opens downwards, or two losses are left, it is the best one that was tried.
    """
    known = {f: loss for f, loss in sorted(losses.items()) if math.isfinite(loss)}
    if not known:
        return Best(1.0, math.nan, dict(losses))
    tried = min(known, key=known.__getitem__)
    found = Best(tried, known[tried], dict(losses))
    if len(known) < 3:
        return found
    x = np.log(list(known))
    a, b, c = np.polyfit(x, list(known.values()), 2)
    if a <= 0:
        return found
    at = float(np.clip(-b / (2 * a), x[0], x[-1]))
    return Best(math.exp(at), float(a * at**2 + b * at + c), dict(losses))


def tried(
    ladder: Ladder, results: Sequence[Result], arm: str, rung: str, tables: bool
) -> Best | None:
    """What was found out about an arm's rates on a rung; None: not all of it is there yet.

    Args:
        ladder: says which factors are tried.
        results: of all runs so far.
        arm: the arm.
        rung: the rung.
        tables: of table_lr alone instead of all rates.
    """
    tuning = ladder.tuning
    found = {
        (r.rates, r.table_rates): r.val_bpb
        for r in results if (r.kind, r.arm, r.rung) == ("tuning", arm, rung)
    }  # fmt: skip
    wanted = (
        [(1.0, f) for f in {1.0, *tuning.table_factors}]
        if tables
        else [(f, 1.0) for f in tuning.factors]
    )
    if any(pair not in found for pair in wanted):
        return None
    return best_factor({pair[tables]: found[pair] for pair in wanted})


def factor_on(
    ladder: Ladder, results: Sequence[Result], arm: str, rung: LadderRung, tables: bool
) -> float | None:
    """What an arm's rates are multiplied by on a rung; None: that is not known yet.

    On a rung that was tuned it is the best factor there, on others what a line through the best
    ones over log FLOPs gives, within the file's limits.
    """
    tuning = ladder.tuning
    if tuning is None:
        return 1.0
    best = {name: tried(ladder, results, arm, name, tables) for name in tuning.rungs}
    if any(found is None for found in best.values()):
        return None
    if rung.name in best:
        factor = best[rung.name].factor
    else:
        x = np.log([ladder.rung(name).flops for name in best])
        y = np.log([found.factor for found in best.values()])
        line = np.polyfit(x, y, 1) if len(x) > 1 else np.array([0.0, y[0]])
        factor = math.exp(float(np.polyval(line, math.log(rung.flops))))
    return round(float(np.clip(factor, *tuning.limits)), DIGITS)
