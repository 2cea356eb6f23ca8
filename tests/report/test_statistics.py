"""Intervals against scipy's tests, which know nothing of ours."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from bov_lightning.report.statistics import difference, mean

few = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
numbers = st.lists(st.floats(0.5, 3), min_size=2, max_size=7, unique=True)


@few
@given(numbers)
def test_mean_has_the_interval_of_the_t_distribution(values):
    found = mean(values)
    n, error = len(values), stats.sem(values)
    low, high = stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=error)
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high))


@few
@given(numbers, st.randoms(use_true_random=False))
def test_differences_of_common_seeds_are_paired(values, random):
    ours = dict(enumerate(values))
    theirs = {
        seed: value + random.uniform(0.01, 0.1) * random.choice([-1, 1])
        for seed, value in ours.items()
    }
    found = difference(ours | {90: 17.0}, theirs | {91: -4.0})
    test = stats.ttest_rel(list(ours.values()), list(theirs.values()))
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert found.clear_of_zero == (interval.low > 0 or interval.high < 0)


@few
@given(numbers, numbers)
def test_differences_without_a_common_seed_are_welchs(a, b):
    found = difference(dict(enumerate(a)), dict(enumerate(b, start=50)))
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6)


def test_one_seed_has_no_interval():
    assert not mean([1.5]).has_interval
    assert difference({0: 1.5, 1: 3.0}, {0: 1.25}).value == 0.25
    for found in (difference({0: 1.5, 1: 3.0}, {0: 1.25}), difference({0: 1.0}, {1: 2.0, 2: 2.5})):
        assert not found.has_interval
        assert not found.clear_of_zero
