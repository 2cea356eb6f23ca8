"""Effective compute: the paper's, and that of ladders whose truth is known."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from report_material import write_run

from bov_lightning.report.comparison import compare
from bov_lightning.report.effective_compute import (
    HIGHEST_FLOOR,
    Rung,
    effective_compute,
    fit,
    lack_of_fit,
    through,
)
from bov_lightning.report.ladder import items
from bov_lightning.report.published import published_multipliers
from bov_lightning.report.reading import read_runs

FLOPS = (3e12, 1e13, 3e13, 1e14)
N_SEED = (3, 3, 2, 2)
LAW = through((3e12, 2.0), (1e14, 1.65), 0.9)


def test_the_authors_gain_is_as_large_at_both_sizes():
    """Ranges over E from 0 to 0.55, as their two sizes leave it open."""
    expected = {
        ("135M", "bov"): (1.28, 1.34), ("780M", "bov"): (1.25, 1.32),
        ("135M", "bov_second_half"): (1.30, 1.37), ("780M", "bov_second_half"): (1.25, 1.33),
        ("135M", "bov_every_second"): (1.31, 1.38), ("780M", "bov_every_second"): (1.15, 1.20),
    }  # fmt: skip
    for (size, name), (low, high) in expected.items():
        found = sorted(published_multipliers(floor)[size][name] for floor in (0, 0.55))
        assert found == pytest.approx([low, high], abs=0.006), (size, name)


def ladder(random, true, shared=0.003, own=0.0015, bend=0.0):
    """Runs of a baseline and of a row that is ``true`` times as efficient."""
    base, row = [], []
    for i, (flops, n) in enumerate(zip(FLOPS, N_SEED, strict=True)):
        both = random.normal(0, shared, n) + bend * (-1) ** i
        base.append(Rung(flops, dict(enumerate(LAW.loss(flops) + both + random.normal(0, own, n)))))
        better = LAW.loss(true * flops) + both + random.normal(0, own, n)
        row.append(Rung(flops, dict(enumerate(better))))
    return base, row


@pytest.mark.slow
@pytest.mark.parametrize("true", [1.2, 1.0])
def test_intervals_cover_the_truth_as_often_as_they_say(true):
    n, random = 250, np.random.default_rng(0)
    covered, flat, won = np.zeros(len(FLOPS)), 0, 0
    for _ in range(n):
        found = effective_compute(*ladder(random, true), n_draw=400)
        estimates = [rung.equal_flops for rung in found.rungs]
        covered += [e.low <= true <= e.high for e in estimates]
        flat += found.slope.low <= 0 <= found.slope.high
        won += all(e.value > 1.03 and e.low > 1 for e in estimates)
    # Four standard deviations of a proportion of 95% in 250 draws.
    assert (abs(covered / n - 0.95) < 0.055).all()
    assert abs(flat / n - 0.95) < 0.055
    assert won == (n if true == 1.2 else 0)


@settings(max_examples=30)
@given(
    true=st.floats(0.5, 2), floor=st.floats(0, 0.7), exponent=st.floats(0.03, 0.3),
    budgets=st.lists(st.floats(12, 21), min_size=4, max_size=6, unique_by=lambda x: round(x, 1)),
)  # fmt: skip
def test_what_has_no_noise_is_recovered(true, floor, exponent, budgets):
    flops = [10**power for power in sorted(budgets)]
    scale = flops[0] ** exponent
    base = [Rung(c, {0: floor + scale * c**-exponent}) for c in flops]
    assume(floor < HIGHEST_FLOOR * base[-1].losses[0])
    row = [Rung(c, {0: floor + scale * (true * c) ** -exponent}) for c in flops]
    found = effective_compute(base, row)
    for rung in found.rungs:
        assert rung.equal_flops.value == pytest.approx(true, rel=0.01)
        assert not rung.equal_flops.has_interval
    assert "no intervals" in found.warning


def test_the_curve_is_found():
    law = fit(FLOPS, [LAW.loss(flops) for flops in FLOPS], N_SEED)
    assert law.loss(1e15) == pytest.approx(LAW.loss(1e15), rel=2e-3)
    assert law.exponent == pytest.approx(LAW.exponent, rel=0.03)


def test_two_rungs_give_numbers_with_a_warning_and_one_none():
    base, row = ladder(np.random.default_rng(1), 1.2, shared=0.001, own=0.0005)
    assert effective_compute(base[:1], row[:1]) is None
    assert effective_compute(base, [None] * 4) is None
    two = effective_compute(base[::3], row[::3])
    assert "two budgets cannot tell the curve's floor" in two.warning
    assert all(1.1 < rung.equal_flops.value < 1.3 for rung in two.rungs)
    assert [len(effective_compute(base, [*row[:n], *[None] * (4 - n)]).rungs) for n in (1, 3)] == [
        1, 3,
    ]  # fmt: skip
    assert effective_compute(base, [row[0], None, None, None]).slope is None


def test_a_baseline_off_the_curve_is_told():
    quiet, bent = (
        ladder(np.random.default_rng(2), 1.1, shared=0.002, bend=bend)[0] for bend in (0, 0.03)
    )
    assert lack_of_fit(quiet) > 0.05 > lack_of_fit(bent)
    assert lack_of_fit(quiet[:3]) is None
    _, row = ladder(np.random.default_rng(2), 1.1, shared=0.002, bend=0.03)
    assert "lack of fit" in effective_compute(bent, row).warning


def test_speed_and_whole_steps_count():
    base, row = ladder(np.random.default_rng(3), 1.2)
    plain = effective_compute(base, row)
    timed = effective_compute(
        [Rung(r.flops, r.losses, 2e9) for r in base],
        [Rung(1.01 * r.flops, r.losses, 1.5e9) for r in row],
    )
    for before, after in zip(plain.rungs, timed.rungs, strict=True):
        assert after.equal_flops.value == pytest.approx(before.equal_flops.value / 1.01)
        assert after.equal_time.value == pytest.approx(after.equal_flops.value * 0.75)
        assert before.equal_time is None


def test_a_row_that_the_baseline_never_reaches_has_no_number():
    base, _ = ladder(np.random.default_rng(4), 1.0)
    found = effective_compute(base, [Rung(f, {0: 0.1, 1: 0.1}) for f in FLOPS])
    assert not np.isfinite(found.rungs[0].equal_flops.value)


def test_reports_of_several_budgets_show_it(tmp_path):
    base, row = ladder(np.random.default_rng(5), 1.3, shared=0.002, own=0.0005)
    for d_model, n_step, *arms in zip((32, 48, 64, 96), (2, 6, 20, 60), base, row, strict=True):
        for name, rung in zip(("standard", "bov"), arms, strict=True):
            for seed, loss in rung.losses.items():
                write_run(
                    tmp_path / f"{name}-{d_model}-{seed}", name, seed,
                    [3.0] * (n_step - 1) + [loss], shape={"d_model": d_model},
                )  # fmt: skip
    (group,) = compare(read_runs([tmp_path])[0], "standard-32-0")
    table, trend, plot = items(group, "", lambda run: run.val_bpb)
    assert [line[0] for line in table.rows] == ["bov"] * 4
    assert [point.y[0] for point in plot.series] == [line[2].value for line in table.rows]
    assert all(line[2].has_interval and line[3].has_interval for line in table.rows)
    assert trend.rows[0][1].has_interval
    # Rows of one budget are no ladder.
    (group,) = compare(read_runs(sorted(tmp_path.glob("*-32-*")))[0], None)
    assert items(group, "", lambda run: run.val_bpb) == []
