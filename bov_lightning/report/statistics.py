"""Means and differences over seeds, with 95% intervals of the t distribution."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number, and where 95% intervals put it; no interval: one observation says nothing."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def has_interval(self) -> bool:
        """Whether it comes from more than one observation."""
        return self.low is not None

    @property
    def clear_of_zero(self) -> bool:
        """Whether its interval leaves zero out."""
        return self.has_interval and (self.low > 0 or self.high < 0)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent observations: mean ± t_{n-1} s / sqrt(n)."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return Estimate(float(values[0]))
    return _interval(values.mean(), values.std(ddof=1) / math.sqrt(len(values)), len(values) - 1)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate:
    """Ours minus theirs, from numbers by seed.

    Runs of one seed share initial weights and the order of the data, so that the mean of their
    differences says more than the difference of their means: seeds that both have are paired, and
    others do not count. Without a common seed it is Welch's interval.
    """
    if common := sorted(ours.keys() & theirs.keys()):
        return mean([ours[seed] - theirs[seed] for seed in common])
    a, b = (np.array(list(numbers.values()), dtype=float) for numbers in (ours, theirs))
    value = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return Estimate(value)
    parts = [x.var(ddof=1) / len(x) for x in (a, b)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return Estimate(value, value, value)
    degrees = sum(parts) ** 2 / sum(
        part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True)
    )
    return _interval(value, error, degrees)


def _interval(value: float, error: float, degrees: float) -> Estimate:
    from scipy.special import stdtrit

    half = float(stdtrit(degrees, (1 + LEVEL) / 2)) * error
    return Estimate(float(value), float(value - half), float(value + half))
