"""The verdict of a ladder: rules against plain arithmetic, and ladders whose truth is known."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder_material import FILE, ladder, result, results

from bov_lightning.errors import UserError
from bov_lightning.recipe.ladder import Condition, Rules
from bov_lightning.report.ladder_report import Study, finding, make_ladder_report
from bov_lightning.report.page import markdown
from bov_lightning.report.statistics import Estimate
from bov_lightning.report.verdict import REFUTED, SUPPORTED, UNDECIDED, Numbers, Tuned, decide

ESTIMATES = st.tuples(*[st.floats(0.8, 1.4)] * 3).map(
    lambda x: Estimate(sorted(x)[1], min(x), max(x))
)
CONTROLS = ("standard", "wide")


@pytest.mark.slow
@settings(max_examples=60)
@given(
    multipliers=st.dictionaries(
        st.sampled_from(CONTROLS), st.lists(ESTIMATES, min_size=3, max_size=3), min_size=2
    ),
    slopes=st.tuples(*[st.tuples(st.floats(-0.1, 0.1), st.floats(0, 0.1))] * 2),
    tuned=st.tuples(st.floats(0.9, 1.2), st.floats(0.9, 1.2)),
    missing=st.booleans(),
)
def test_the_file_s_rules_are_what_they_say(multipliers, slopes, tuned, missing):
    """As the issue words them: m > 1.03 with its interval above 1 on all rungs against both, and a
    slope that is not significantly negative; refuted if the interval reaches 1 on the top rung, or
    bov is no better than wide there, or tuning removes the gain."""
    rules = ladder().verdict
    numbers = Numbers(
        {name: dict(zip("abc", found, strict=True)) for name, found in multipliers.items()},
        {name: Estimate(mid, mid - off, mid + off)
         for name, (mid, off) in zip(CONTROLS, slopes, strict=True)},
        {"standard": Tuned("a", *tuned), "wide": None},
        ("3e13 of wide",) if missing else (),
    )  # fmt: skip
    everything = [m for found in multipliers.values() for m in found]
    supported = (
        min(m.value for m in everything) > 1.03
        and min(m.low for m in everything) > 1
        and all(mid + off >= 0 for mid, off in slopes)
    )
    refuted = (
        multipliers["standard"][-1].low <= 1
        or multipliers["wide"][-1].value <= 1
        or (tuned[0] > 1 and tuned[1] <= 1)
    )
    expected = (
        UNDECIDED if missing else REFUTED if refuted else SUPPORTED if supported else UNDECIDED
    )
    verdict = decide(rules, numbers)
    assert verdict.word == expected
    assert verdict.reason


def test_what_is_not_known_decides_nothing():
    rules = ladder().verdict
    fine = {"a": Estimate(1.2, 1.1, 1.3)}
    known = Numbers(
        dict.fromkeys(CONTROLS, fine), dict.fromkeys(CONTROLS, Estimate(0.0, -0.1, 0.1)),
        {"standard": Tuned("a", 1.2, 1.2)},
    )  # fmt: skip
    assert decide(rules, known).word == SUPPORTED
    for change in (
        {"multipliers": {**known.multipliers, "wide": {}}},
        {"multipliers": {**known.multipliers, "wide": {"a": Estimate(1.2)}}},
        {"multipliers": {**known.multipliers, "wide": {"a": Estimate(math.nan, 1.1, 1.3)}}},
        {"slopes": {"standard": Estimate(0.0)}},
        {"tuned": {}},
    ):
        verdict = decide(rules, dataclasses.replace(known, **change))
        assert verdict.word == UNDECIDED
        assert "not known" in verdict.reason
    only = Rules("bov", [], [Condition("multiplier_at_most", 1.0, ["standard"], "top")])
    assert decide(only, known).word == UNDECIDED


TRUE = {"standard": 1.0, "bov": 1.2, "wide": 1.05}


def test_a_large_gain_is_supported_and_one_that_tuning_removes_is_refuted():
    of, random = ladder(), np.random.default_rng(0)
    study = Study(of, results(of, TRUE, random), n_draw=200)
    assert study.verdict().word == SUPPORTED
    sentences = finding(study, study.verdict())
    assert len(sentences) == 2
    assert "standard would need 1." in sentences[0]
    assert "this is supported: these hold: multiplier above 1.03;" in sentences[1]
    removed = results(of, TRUE, random, tuned={"standard": 1.25, "bov": 1.2})
    verdict = Study(of, removed, n_draw=200).verdict()
    assert verdict.word == REFUTED
    assert "tuning takes the multiplier to 1 or less" in verdict.reason


def test_a_control_that_is_as_good_refutes_and_one_at_the_top_too():
    of, random = ladder(), np.random.default_rng(1)
    verdict = Study(of, results(of, TRUE | {"wide": 1.3}, random), n_draw=200).verdict()
    assert verdict.word == REFUTED
    assert "multiplier 1 or less (bov against wide at 1e14" in verdict.reason


@pytest.mark.slow
def test_what_is_no_better_is_hardly_ever_supported():
    of, random, n = ladder(), np.random.default_rng(2), 100
    said = [
        Study(of, results(of, TRUE | {"bov": 1.0, "wide": 1.0}, random), n_draw=100).verdict().word
        for _ in range(n)
    ]
    assert said.count(SUPPORTED) <= 0.05 * n
    better = [
        Study(of, results(of, TRUE | {"wide": 1.0}, random), n_draw=100).verdict().word
        for _ in range(20)
    ]
    assert better.count(SUPPORTED) >= 15


def test_what_was_not_run_is_named_and_leaves_it_undecided():
    of, random = ladder(), np.random.default_rng(3)
    found = results(of, TRUE, random, ["3e12", "1e13", "3e13"])
    study = Study(of, found, n_draw=200)
    assert study.verdict().word == UNDECIDED
    assert (
        "1e14 of bov (seeds 0, 1), standard (seeds 0, 1), wide (seed 0)" in study.verdict().reason
    )
    text = markdown(make_ladder_report(study))
    assert "| 1e14 | bov | all | yes |" in text
    assert "| 1e16 | bov | all | no |" in text
    # An optional rung counts once all that the rules need is there, not before.
    more = [*results(of, TRUE, random), *results(of, TRUE, random, ["1e15"])[:-1]]
    assert Study(of, more).counted()[0] == ["3e12", "1e13", "3e13", "1e14"]
    more = results(of, TRUE, random, [r.name for r in of.rungs[:5]])
    assert Study(of, more).counted()[0][-1] == "1e15"


def test_warnings_are_in_the_report():
    of, random = ladder(), np.random.default_rng(4)
    found = results(of, TRUE, random)
    found[-1] = dataclasses.replace(found[-1], epochs=4.2, ladder="another")
    found.append(result(of, "1e13", "bov_second_half", 0, math.nan))
    text = markdown(make_ladder_report(Study(of, found, n_draw=200)))
    assert "more than 2 passes over the text at 1e14 (4.2)" in text
    assert "ladder.yaml has changed since 1 of" in text
    assert "Diverged, and without a number: ladder-1e13-bov" in text.replace("\\", "")


def test_a_baseline_without_a_number_is_refused():
    of = ladder()
    found = results(of, TRUE, np.random.default_rng(5))
    found[0] = dataclasses.replace(found[0], val_bpb=math.nan)
    with pytest.raises(UserError, match="of the baseline, has val_bpb nan: no multiplier can be"):
        Study(of, found)


def test_the_preregistered_file_is_in_its_place():
    of = ladder(FILE)
    assert [rung.flops for rung in of.rungs[:4]] == [3e12, 1e13, 3e13, 1e14]
    assert of.verdict.controls == ["standard", "wide"]
