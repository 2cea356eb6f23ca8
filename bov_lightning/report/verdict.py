"""Supported, refuted at this scale, or undecided: by rules that a file held before the runs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bov_lightning.recipe.ladder import Condition, Rules
from bov_lightning.report.statistics import Estimate

WORDS = {
    "multiplier_above": "multiplier above {}",
    "interval_above": "whole interval above {}",
    "slope_interval_reaches": (
        "the multiplier does not clearly fall as compute grows (its slope's interval reaches {})"
    ),
    "interval_reaches_down_to": "interval reaches down to {}",
    "multiplier_at_most": "multiplier {} or less",
    "tuning_takes_multiplier_to": "tuning takes the multiplier to {} or less",
}
"""The rules of `Condition`, for people."""

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted at this scale", "undecided"


@dataclass(frozen=True)
class Tuned:
    """Multipliers of the runs that tuned rates, on the highest rung that was tuned."""

    rung: str
    untuned: float
    """With the rates that the recipe has."""
    tuned: float
    """With the best rates of each."""


@dataclass(frozen=True)
class Numbers:
    """What rules are applied to."""

    multipliers: dict[str, dict[str, Estimate]]
    """By the arm that they are taken to, and by rung, ascending: those rungs that count."""
    slopes: dict[str, Estimate | None]
    """Of log m in log FLOPs, by the arm that m is taken to."""
    tuned: dict[str, Tuned | None]
    """By the arm that they are taken to."""
    missing: tuple[str, ...] = ()
    """What the rules need and has not been run."""


@dataclass(frozen=True)
class Checked:
    """A condition, and whether it holds."""

    condition: Condition
    holds: bool | None
    """None: not known, since a number is missing."""
    said: str
    """The numbers, in words."""

    @property
    def words(self) -> str:
        """The condition, in words."""
        return WORDS[self.condition.rule].format(f"{self.condition.number:g}")


@dataclass(frozen=True)
class Verdict:
    """What the rules say."""

    word: str
    """supported, refuted at this scale, or undecided."""
    supported: list[Checked]
    """What all has to hold for the first."""
    refuted: list[Checked]
    """What any of is enough for the second."""
    missing: tuple[str, ...]
    """What was not run."""

    @property
    def reason(self) -> str:
        """Why, in a sentence without its full stop."""
        if self.missing:
            return f"not run yet: {'; '.join(self.missing)}"
        if self.word == REFUTED:
            return "; ".join(f"{c.words} ({c.said})" for c in self.refuted if c.holds)
        if self.word == SUPPORTED:
            return f"these hold: {'; '.join(c.words for c in self.supported)}"
        unknown = [c for c in (*self.supported, *self.refuted) if c.holds is None]
        if unknown:
            return "; ".join(f"not known: {c.words} ({c.said})" for c in unknown)
        failed = [c for c in self.supported if c.holds is False]
        if failed:
            return (
                f"of the {len(self.supported)} conditions for {SUPPORTED}, {len(failed)} fail"
                f"{'s' * (len(failed) == 1)}, and none for {REFUTED} holds. What fails: "
                + "; ".join(f"{c.words}: {c.said}" for c in failed)
            )
        return "there are no rules"


def decide(rules: Rules, numbers: Numbers) -> Verdict:
    """Applies the rules.

    While something that they need is missing, it is undecided. Otherwise one condition for
    *refuted* is enough, and all for *supported* have to hold.
    """
    supported = [_check(c, rules.arm, numbers, all_of=True) for c in rules.supported]
    refuted = [_check(c, rules.arm, numbers, all_of=False) for c in rules.refuted]
    word = UNDECIDED
    if not numbers.missing:
        if any(c.holds for c in refuted):
            word = REFUTED
        elif (
            supported
            and all(c.holds for c in supported)
            and not any(c.holds is None for c in refuted)
        ):
            word = SUPPORTED
    return Verdict(word, supported, refuted, numbers.missing)


def _check(condition: Condition, arm: str, numbers: Numbers, all_of: bool) -> Checked:
    found = [
        (name, *each) for name in condition.against for each in _compared(condition, numbers, name)
    ]
    answers = [holds for _, holds, _ in found]
    holds = _all(answers) if all_of else _any(answers)
    # What decides it: where it fails (or holds, for one that any is enough for), else all.
    deciding = [x for x in found if x[1] is (not all_of)] or found
    told = "; ".join(f"against {name} {said}" for name, _, said in deciding)
    return Checked(condition, holds, f"{arm} {told}")


def _compared(
    condition: Condition, numbers: Numbers, name: str
) -> Iterable[tuple[bool | None, str]]:
    """(whether it holds, the numbers in words) for every rung that the condition is about."""
    rule, than = condition.rule, condition.number
    if rule == "slope_interval_reaches":
        slope = numbers.slopes.get(name)
        if slope is None or not slope.has_interval:
            return [(None, "has no interval for the multiplier's slope")]
        return [(slope.high >= than, f"has the slope {_shown(slope, '+.3f')}")]
    if rule == "tuning_takes_multiplier_to":
        tuned = numbers.tuned.get(name)
        if tuned is None or not all(map(math.isfinite, (tuned.untuned, tuned.tuned))):
            return [(None, "has no multiplier with and without tuned rates")]
        return [(
            tuned.untuned > than >= tuned.tuned,
            f"at {tuned.rung} has multiplier {tuned.untuned:.3f} at untuned rates and "
            f"{tuned.tuned:.3f} at the best ones",
        )]  # fmt: skip
    multipliers = numbers.multipliers.get(name) or {}
    if not multipliers:
        return [(None, "has no multiplier")]
    rungs = list(multipliers) if condition.rungs == "every" else list(multipliers)[-1:]
    return [
        (_compare(rule, multipliers[rung], than),
         f"at {rung} has multiplier {_shown(multipliers[rung], '.3f')}")
        for rung in rungs
    ]  # fmt: skip


def _compare(rule: str, m: Estimate, than: float) -> bool | None:
    if math.isnan(m.value):
        return None
    if rule == "multiplier_above":
        return m.value > than
    if rule == "multiplier_at_most":
        return m.value <= than
    if not m.has_interval:
        return None
    return m.low > than if rule == "interval_above" else m.low <= than


def _all(answers: list[bool | None]) -> bool | None:
    return False if False in answers else None if None in answers else True


def _any(answers: list[bool | None]) -> bool | None:
    return True if True in answers else None if None in answers else False


def _shown(number: Estimate, spec: str) -> str:
    if not number.has_interval:
        return f"{number.value:{spec}} (no interval)"
    return f"{number.value:{spec}} [{number.low:{spec}}, {number.high:{spec}}]"
