"""Rates from runs that tried some: parabolas whose lowest point is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ladder_material import ladder, result

from bov_lightning.report.tuning import best_factor, factor_on


@given(at=st.floats(-0.6, 0.6), bend=st.floats(0.01, 1), loss=st.floats(0.5, 3))
def test_the_lowest_point_of_a_parabola_is_found(at, bend, loss):
    def bowl(factor: float) -> float:
        return loss + bend * (math.log(factor) - at) ** 2

    found = best_factor({f: bowl(f) for f in (0.5, 1.0, 2.0)})
    assert found.factor == pytest.approx(math.exp(at), rel=1e-6)
    assert found.loss == pytest.approx(loss, abs=1e-9)


@given(losses=st.lists(st.floats(0.5, 3), min_size=3, max_size=3))
def test_nothing_beyond_what_was_tried_is_used(losses):
    found = best_factor(dict(zip((0.5, 1.0, 2.0), losses, strict=True)))
    assert 0.5 <= found.factor <= 2 * (1 + 1e-12)


def test_what_diverged_does_not_count():
    assert best_factor({0.5: 1.2, 1.0: 1.1, 2.0: math.nan}).factor == 1.0
    assert best_factor({0.5: 1.0, 1.0: math.inf, 2.0: math.nan}).factor == 0.5
    assert best_factor({0.5: 1.1, 1.0: 1.0, 2.0: 1.05}).factor < 2
    assert math.isnan(best_factor({1.0: math.nan}).loss)


def test_rates_follow_a_line_to_the_other_rungs_within_the_limits():
    of = ladder()

    def tuned(arm: str, rung: str, at: float) -> list:
        return [
            result(of, rung, arm, 0, 2 + (math.log(f) - math.log(at)) ** 2, rates=f, kind="tuning")
            for f in of.tuning.factors
        ]

    found = [*tuned("standard", "3e12", 1.0), *tuned("standard", "1e13", 0.8)]
    low, high = math.log(3e12), math.log(1e13)
    for rung in of.rungs:
        factor = factor_on(of, found, "standard", rung, tables=False)
        line = np.interp(math.log(rung.flops), [low, high], [0, math.log(0.8)])
        beyond = math.log(0.8) * (math.log(rung.flops) - low) / (high - low)
        expected = math.exp(line if rung.flops <= 1e13 else max(beyond, math.log(0.5)))
        assert factor == pytest.approx(expected, abs=1e-3)
    # Until all of them have ended there is no line.
    assert factor_on(of, found[:-1], "standard", of.rungs[3], tables=False) is None
