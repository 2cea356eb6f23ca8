"""Effective compute: how much compute a baseline would need for the loss that a row has reached.

A baseline that was trained with several budgets C follows L = E + A C^-a. A row's multiplier m(C)
is the compute at which that curve reaches the row's loss, over C: 1.2 means that the baseline
would need 1.2 times the compute. Losses are bits per byte, compute is FLOPs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bov_lightning.report.statistics import LEVEL, Estimate

N_DRAW = 2000
N_FLOOR = 33
"""Values of E that are tried, between the neighbours of the best one again, and again."""
HIGHEST_FLOOR = 0.75
"""Of the lowest loss: where E may lie. The authors' two sizes (0.854 and 0.722 bits per byte) are
compatible with anything up to about 0.55, which is three quarters of the lower one."""


@dataclass(frozen=True)
class PowerLaw:
    """L = floor + scale * C^-exponent."""

    floor: float
    scale: float
    exponent: float

    def loss(self, flops: float) -> float:
        """Bits per byte after that much compute."""
        return self.floor + self.scale * flops**-self.exponent

    def multiplier(self, baseline: float, other: float) -> float:
        """m for a loss of ``other`` where the baseline has ``baseline``.

        The curve is moved through the baseline's own point, so that what a rung's data and seeds
        do to both losses alike does not count. NaN: the baseline never gets there.
        """
        return float(_multiplier(self.floor, self.exponent, baseline, other))


@dataclass(frozen=True)
class Rung:
    """The runs of one row with one budget."""

    flops: float
    losses: Mapping[int, float]
    """By seed."""
    flops_per_second: float | None = None
    """Speed of training, measured beside the baseline's."""


@dataclass(frozen=True)
class RungMultiplier:
    """A row against the baseline at one budget."""

    flops: float
    """What the row was trained with."""
    equal_flops: Estimate
    """m at equal compute."""
    equal_time: Estimate | None
    """m at equal training time; None where speeds are not known."""


@dataclass(frozen=True)
class EffectiveCompute:
    """A row against the baseline at all budgets that both were trained with."""

    law: PowerLaw
    rungs: list[RungMultiplier]
    slope: Estimate | None
    """Of log m in log C: below zero, the gain shrinks with compute. None: one rung."""
    warning: str
    """What keeps the numbers from being relied on; empty: nothing."""


def fit(flops: Sequence[float], losses: Sequence[float], weights: Sequence[float]) -> PowerLaw:
    """The curve through the mean losses of at least three rungs, by weighted least squares.

    Args:
        flops: compute of each rung.
        losses: mean loss of each rung.
        weights: seeds of each rung.
    """
    floors, scales, exponents = _fit(
        np.log(np.asarray(flops, float)), np.asarray(losses, float)[None],
        np.asarray(weights, float),
    )  # fmt: skip
    return PowerLaw(float(floors[0]), float(scales[0]), float(exponents[0]))


def through(low: tuple[float, float], high: tuple[float, float], floor: float) -> PowerLaw:
    """The curve with a given E through two points (FLOPs, loss)."""
    exponent = math.log((low[1] - floor) / (high[1] - floor)) / math.log(high[0] / low[0])
    return PowerLaw(floor, (low[1] - floor) * low[0] ** exponent, exponent)


def lack_of_fit(baseline: Sequence[Rung]) -> float | None:
    """How likely seeds alone are to put the rungs so far off the curve, from 0 to 1.

    The F test of the rungs' means against the scatter within them. None: fewer than four rungs, or
    no rung with two seeds.
    """
    from scipy.special import fdtrc

    n_free = len(baseline) - 3
    n_seed = np.array([len(rung.losses) for rung in baseline])
    degrees = int((n_seed - 1).sum())
    if n_free < 1 or degrees < 1:
        return None
    means = np.array([_mean(rung) for rung in baseline])
    law = fit([rung.flops for rung in baseline], means, n_seed)
    off = n_seed @ (means - np.array([law.loss(rung.flops) for rung in baseline])) ** 2 / n_free
    scatter = sum(
        (loss - mean) ** 2
        for rung, mean in zip(baseline, means, strict=True) for loss in rung.losses.values()
    ) / degrees  # fmt: skip
    return float(fdtrc(n_free, degrees, off / scatter)) if scatter else float(off == 0)


def effective_compute(
    baseline: Sequence[Rung], row: Sequence[Rung | None], n_draw: int = N_DRAW, seed: int = 0
) -> EffectiveCompute | None:
    """The row's multipliers on the rungs that both have.

    Intervals are of 95%, from ``n_draw`` draws of all mean losses: what seeds do to baseline and
    row, pooled over the rungs, is a bivariate normal distribution around the means, whose size is
    as uncertain as its degrees of freedom make it; the curve is fitted to each draw anew. Runs of
    one seed are paired.

    Args:
        baseline: by compute, ascending; fewer than two rungs: the result is None.
        row: the same rungs, None where the row was not trained; whole steps may make its compute
            differ a little from the baseline's. Not one rung: the result is None.
        n_draw: draws.
        seed: of the draws.
    """
    shared = [i for i, rung in enumerate(row) if rung is not None]
    if len(baseline) < 2 or not shared:
        return None
    log_flops = np.log([rung.flops for rung in baseline])
    pairs = [_pair(base, ours) for base, ours in zip(baseline, row, strict=True)]
    n_base = np.array([len(rung.losses) for rung in baseline], float)
    base_means = np.array([_mean(rung) for rung in baseline])
    base_draws, pair_draws = _draws(baseline, pairs, n_draw, np.random.default_rng(seed))

    def multipliers(curve: np.ndarray, paired: list[np.ndarray]) -> np.ndarray:
        """(draws, shared rungs), from mean losses (draws, rungs) and pairs of means (draws, 2)."""
        if len(baseline) == 2:
            # Two points say nothing of E: the middle of what it may be.
            floors = curve.min(1) * HIGHEST_FLOOR / 2
            above = np.log(curve - floors[:, None])
            exponents = (above[:, 0] - above[:, 1]) / (log_flops[1] - log_flops[0])
        else:
            floors, _, exponents = _fit(log_flops, curve, n_base)
        return np.stack([
            _multiplier(floors, exponents, *paired[i].T) * baseline[i].flops / row[i].flops
            for i in shared
        ], axis=1)  # fmt: skip

    means = [pair.mean(0)[None] if len(pair) else pair for pair in pairs]
    found = multipliers(base_means[None], means)[0]
    drawn = None if base_draws is None else multipliers(base_draws, pair_draws)
    rungs = []
    for j, i in enumerate(shared):
        value = _estimate(found[j], None if drawn is None else drawn[:, j])
        ours, theirs = row[i].flops_per_second, baseline[i].flops_per_second
        timed = _times(value, ours / theirs) if ours and theirs else None
        rungs.append(RungMultiplier(row[i].flops, value, timed))
    slope = None
    if len(shared) > 1:
        at = log_flops[shared]
        slope = _estimate(
            _slope(at, found[None])[0], None if drawn is None else _slope(at, drawn)
        )  # fmt: skip
    law = (
        fit(np.exp(log_flops), base_means, n_base) if len(baseline) > 2
        else through(
            *((rung.flops, _mean(rung)) for rung in baseline),
            floor=float(base_means.min()) * HIGHEST_FLOOR / 2,
        )
    )  # fmt: skip
    return EffectiveCompute(law, rungs, slope, _warning(baseline, drawn is not None))


def _warning(baseline: Sequence[Rung], has_interval: bool) -> str:
    said = []
    if len(baseline) == 2:
        said.append("two budgets cannot tell the curve's floor, which is taken in the middle of "
                    "what it may be")  # fmt: skip
    if not has_interval:
        said.append("no budget has two seeds, so there are no intervals")
    chance = lack_of_fit(baseline)
    if chance is not None and chance < 1 - LEVEL:
        said.append(f"the baseline does not follow the curve (lack of fit, p = {chance:.2g})")
    return "; ".join(said)


def _mean(rung: Rung) -> float:
    return float(np.mean(list(rung.losses.values())))


def _pair(rung: Rung, ours: Rung | None) -> np.ndarray:
    """(n, 2): losses of baseline and row by common seed; the means where there is none."""
    if ours is None:
        return np.empty((0, 2))
    common = sorted(rung.losses.keys() & ours.losses.keys())
    if not common:
        return np.array([[_mean(rung), _mean(ours)]])
    return np.array([[rung.losses[seed], ours.losses[seed]] for seed in common])


def _draws(
    baseline: Sequence[Rung], pairs: list[np.ndarray], n_draw: int, random: np.random.Generator
) -> tuple[np.ndarray | None, list[np.ndarray]]:
    """Draws of the baseline's mean losses (draws, rungs), and of each rung's pair (draws, 2).

    Where all seeds are paired both hold the same baseline.
    """
    off = [pair - pair.mean(0) for pair in pairs if len(pair) > 1]
    degrees = sum(len(pair) - 1 for pair in off)
    if not degrees:
        return None, []
    residuals = np.concatenate(off)
    spread = residuals.T @ residuals / degrees
    root = _root(spread)
    wider = np.sqrt(degrees / random.chisquare(degrees, n_draw))[:, None]
    curve, paired = [], []
    for rung, pair in zip(baseline, pairs, strict=True):
        noise = random.standard_normal((n_draw, 2)) @ root.T * wider
        curve.append(_mean(rung) + noise[:, 0] / math.sqrt(len(rung.losses)))
        paired.append(pair.mean(0) + noise / math.sqrt(len(pair)) if len(pair) else pair)
    return np.stack(curve, axis=1), paired


def _root(spread: np.ndarray) -> np.ndarray:
    """A matrix whose product with its transpose is ``spread``, which may be singular: two seeds."""
    try:
        return np.linalg.cholesky(spread)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(spread)
        return vectors * np.sqrt(np.maximum(values, 0))


def _fit(
    log_flops: np.ndarray, losses: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Floor, scale and exponent of each row of ``losses`` (draws, rungs).

    For a given floor the curve is a line in logarithms; the floor is searched for.
    """
    rows, highest = np.arange(len(losses)), losses.min(1) * HIGHEST_FLOOR
    low, high = np.zeros(len(losses)), highest
    for _ in range(3):
        floors = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, N_FLOOR)
        above = losses[:, None] - floors[:, :, None]
        # An error of L is one of log (L - E) times L - E.
        weight = weights * above**2
        total = weight.sum(2)
        y = np.log(above)
        x_mean = (weight * log_flops).sum(2) / total
        y_mean = (weight * y).sum(2) / total
        x_off = log_flops - x_mean[:, :, None]
        slope = (weight * x_off * y).sum(2) / (weight * x_off**2).sum(2)
        fitted = np.exp(y_mean[:, :, None] + slope[:, :, None] * x_off)
        best = (weights * (above - fitted) ** 2).sum(2).argmin(1)
        floor, step = floors[rows, best], (high - low) / (N_FLOOR - 1)
        low, high = np.maximum(floor - step, 0), np.minimum(floor + step, highest)
    slope = slope[rows, best]
    scale = np.exp(y_mean[rows, best] - slope * x_mean[rows, best])
    return floor, scale, -slope


def _multiplier(floor, exponent, baseline, other):
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        ratio = (np.asarray(baseline) - floor) / (np.asarray(other) - floor)
        return np.where(ratio > 0, ratio, np.nan) ** (1 / np.asarray(exponent))


def _slope(log_flops: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    off = log_flops - log_flops.mean()
    return np.log(multipliers) @ off / (off @ off)


def _estimate(value: float, draws: np.ndarray | None) -> Estimate:
    if draws is None:
        return Estimate(float(value))
    # A draw whose baseline never gets there needs more compute than any other.
    draws = np.where(np.isfinite(draws), draws, np.inf)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return Estimate(float(value), float(low), float(high))


def _times(estimate: Estimate, factor: float) -> Estimate:
    if not estimate.has_interval:
        return Estimate(estimate.value * factor)
    return Estimate(*(part * factor for part in (estimate.value, estimate.low, estimate.high)))
