"""A ladder of sizes: what is trained on which rung, and, written down beforehand, what follows.

One YAML file holds the rungs (shape, budget, batch), the arms (value overlays) with their seeds,
how rates are tuned, the hypothesis, and the rules by which a report later says *supported*,
*refuted at this scale* or *undecided*. `docs/results/ladder/ladder.yaml` is one.
"""

import dataclasses
import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from bov_lightning.errors import UserError
from bov_lightning.kinds import COUNT, SEED, Range
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.recipe.annotations import hints_of
from bov_lightning.recipe.building import build
from bov_lightning.recipe.keys import check_keys, nearest
from bov_lightning.recipe.overlays import find_recipe, read_yaml
from bov_lightning.recipe.settling import settle

VALUE_KEYS = ("model.config.value", "model.config.d_mlp")
"""What arms may differ in: the values, and the width of the MLPs that is their control."""

POSITIVE = Range(above=0, most=10**40)


@dataclass(frozen=True)
class LadderRung:
    """One size, and how long it is trained."""

    name: str
    """What runs and tables call it."""
    flops: Annotated[float, POSITIVE]
    """Training FLOPs of each run."""
    batch: Annotated[int, COUNT]
    """Tokens per optimizer step."""
    micro: Annotated[int, COUNT]
    """Rows per micro-step."""
    config: dict[str, Any] = field(default_factory=dict)
    """Keys of model.config that make its shape."""
    optional: bool = False
    """Whether there is a verdict without it. Once it has been run, it counts like the others."""


@dataclass(frozen=True)
class LadderArm:
    """One way of computing values."""

    values: str
    """An overlay, by its name in recipes/values or its path."""
    seeds: list[int]
    """Seeds 0 to n - 1 on each rung, in the order of the rungs; 0: not on that rung."""
    rates_of: str | None = None
    """The arm whose tuned rates it takes; null: its own."""

    @property
    def name(self) -> str:
        """What runs and tables call it."""
        return Path(self.values).stem


@dataclass(frozen=True)
class Tuning:
    """How learning rates are chosen before the rungs are run."""

    rungs: list[str]
    """Where rates are tried; on the others, those that follow in a line over log FLOPs are used."""
    arms: list[str]
    """Whose rates are tuned."""
    rates: list[str]
    """Keys of model.optimizer that are multiplied together."""
    factors: Annotated[list[float], POSITIVE]
    """What they are multiplied by, 1 among them; the best is the lowest point of a parabola."""
    table_factors: Annotated[list[float], POSITIVE]
    """What table_lr alone is multiplied by, where an arm has tables."""
    limits: Annotated[list[float], POSITIVE]
    """Lowest and highest factor that is used, wherever lines lead."""
    seed: Annotated[int, SEED] = 0
    """Of the runs that tune."""
    check: str | None = None
    """A rung on which each tuned arm is also trained with untuned rates, for comparison."""


@dataclass(frozen=True)
class Condition:
    """One comparison with a number that was chosen beforehand."""

    rule: Literal[
        "multiplier_above", "interval_above", "slope_interval_reaches", "interval_reaches_down_to",
        "multiplier_at_most", "tuning_takes_multiplier_to",
    ]  # fmt: skip
    """multiplier_above: the multiplier is larger than the number. interval_above: its whole 95%
    interval is. slope_interval_reaches: the interval of the slope of log m ends at the number or
    above. interval_reaches_down_to: the multiplier's interval begins at the number or below.
    multiplier_at_most: the multiplier is the number or less. tuning_takes_multiplier_to: on the
    highest rung that was tuned, the multiplier is above the number at untuned rates and not above
    it when each arm has its own best ones."""
    number: float
    """The threshold."""
    against: list[str]
    """Which arms the multiplier is taken to."""
    rungs: Literal["every", "top"] = "every"
    """On which rungs."""


@dataclass(frozen=True)
class Rules:
    """What counts as what."""

    arm: str
    """The arm that the hypothesis is about."""
    supported: list[Condition]
    """All of these, on every rung and against every arm that they name."""
    refuted: list[Condition]
    """Any of these, on any rung or against any arm that it names; asked first."""

    @property
    def controls(self) -> list[str]:
        """Every arm that it is compared with."""
        named = (name for c in (*self.supported, *self.refuted) for name in c.against)
        return list(dict.fromkeys(named))


@dataclass(frozen=True)
class SpeedConfig:
    """How training speed is measured, for comparisons at equal time."""

    rungs: list[str] = field(default_factory=list)
    """Where."""
    rounds: Annotated[int, COUNT] = 5
    """Steps of each arm, in turn with the others; their median counts."""


@dataclass(frozen=True)
class Ladder:
    """The whole file."""

    path: Path
    """Where it lies."""
    digest: str
    """Of its content."""
    name: str
    """Runs are called NAME-RUNG-ARM-seedN."""
    recipe: str
    """The recipe that all runs share."""
    settings: dict[str, Any]
    """What of it all runs have otherwise."""
    precision: dict[str, str]
    """trainer.precision by kind of device, cpu or cuda."""
    baseline: str
    """The arm whose curve gives the multipliers."""
    rungs: list[LadderRung]
    """By FLOPs, ascending."""
    arms: list[LadderArm]
    """The baseline among them."""
    tuning: Tuning | None
    """None: all rates as the recipe has them."""
    speed: SpeedConfig
    """What is measured for equal time."""
    hypothesis: str
    """What is to be found out, in a sentence."""
    verdict: Rules
    """By which rules."""
    max_epochs: float
    """Passes over the text above which there is a warning."""

    def rung(self, name: str) -> LadderRung:
        """The rung of that name."""
        return next(rung for rung in self.rungs if rung.name == name)

    def arm(self, name: str) -> LadderArm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def seeds(self, arm: str, rung: str) -> list[int]:
        """The seeds with which an arm is trained on a rung."""
        at = [r.name for r in self.rungs].index(rung)
        return list(range(self.arm(arm).seeds[at]))


@dataclass(frozen=True)
class _File:
    """The file's top level."""

    name: str
    recipe: str
    baseline: str
    rungs: list[Any]
    arms: list[Any]
    hypothesis: str
    verdict: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, str] = field(
        default_factory=lambda: {"cpu": "32-true", "cuda": "bf16-mixed"}
    )
    tuning: dict[str, Any] | None = None
    speed: dict[str, Any] = field(default_factory=dict)
    max_epochs: Annotated[float, POSITIVE] = 2.0


def read_ladder(path: Path) -> Ladder:
    """The ladder in a file.

    Raises:
        UserError: no such file, unknown or missing keys, rungs out of order, arms that differ in
            more than values, names that nothing has.
    """
    origin, data = str(path), read_yaml(path)
    file = _section(_File, data, "", origin)
    check_keys(file.settings, f"{origin}: settings")
    rungs = [_section(LadderRung, x, f"rungs[{i}]", origin) for i, x in enumerate(file.rungs)]
    arms = [_section(LadderArm, x, f"arms[{i}]", origin) for i, x in enumerate(file.arms)]
    tuning = file.tuning and _section(Tuning, file.tuning, "tuning", origin)
    speed = _section(SpeedConfig, file.speed, "speed", origin)
    ladder = Ladder(
        path, hashlib.sha256(path.read_bytes()).hexdigest()[:12], file.name, file.recipe,
        file.settings, file.precision, file.baseline, rungs, arms, tuning, speed,
        " ".join(file.hypothesis.split()), _rules(file.verdict, origin), file.max_epochs,
    )  # fmt: skip
    try:
        _check(ladder)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    return ladder


def _rules(data: dict, origin: str) -> Rules:
    lists = {
        name: [
            _section(Condition, item, f"verdict.{name}[{i}]", origin)
            for i, item in enumerate(data.get(name) or [])
        ]
        for name in ("supported", "refuted")
    }
    return dataclasses.replace(_section(Rules, {**data, "supported": [], "refuted": []}, "verdict",
                                        origin), **lists)  # fmt: skip


def _section(cls: type, data: Any, where: str, origin: str) -> Any:
    """A dataclass from plain data; every problem is a `UserError` that names the key."""
    called = where or "its top level"
    if not isinstance(data, dict):
        raise UserError(f"{origin}: {called} is {data!r}, but must be a section with keys")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            here, known = f"{where}.{key}".lstrip("."), [f"{where}.{f}".lstrip(".") for f in fields]
            hint = nearest(here, known)
            raise UserError(
                f"{origin}: unknown key {here}" + (f": did you mean {hint}?" * bool(hint))
            )
    for name, found in fields.items():
        missing = found.default is found.default_factory is dataclasses.MISSING
        if missing and name not in data:
            raise UserError(f"{origin}: {where}.{name} is missing".replace(": .", ": "))
    hints = hints_of(cls)
    try:
        settled = {k: settle(v, hints[k], f"{where}.{k}".lstrip(".")) for k, v in data.items()}
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    return build(cls, settled, origin, where)


def _check(ladder: Ladder) -> None:
    """Refuses what no run could put right."""
    if not ladder.rungs or not ladder.arms:
        raise UserError("rungs and arms must not be empty")
    for low, high in itertools.pairwise(ladder.rungs):
        if low.flops >= high.flops:
            raise UserError(
                f"rungs are out of order: {high.name} ({high.flops:.3g} FLOPs) comes after "
                f"{low.name} ({low.flops:.3g}): list them by FLOPs, the lowest first"
            )
    for rung in ladder.rungs:
        for key in ("sequence_len", "vocab_size", "value", "d_mlp"):
            if key in rung.config:
                why = (
                    "arms decide that"
                    if key in ("value", "d_mlp")
                    else ("all rungs share one text, so set it in settings")
                )
                raise UserError(f"rung {rung.name} has config.{key}: {why}")
    names, rungs = [arm.name for arm in ladder.arms], [rung.name for rung in ladder.rungs]
    for what, given in (("rungs", rungs), ("arms", names)):
        if len(set(given)) < len(given):
            raise UserError(f"{what}: {max(given, key=given.count)} is given twice")
    for arm in ladder.arms:
        if len(arm.seeds) != len(rungs) or any(type(n) is not int or n < 0 for n in arm.seeds):
            raise UserError(
                f"arm {arm.name} has seeds {arm.seeds}: give a number for each of the "
                f"{len(rungs)} rungs, 0 for none"
            )
        _check_values(arm)
    tuning = ladder.tuning
    mentioned = [("baseline", [ladder.baseline], names),
                 ("verdict.arm", [ladder.verdict.arm], names),
                 ("verdict: against", ladder.verdict.controls, names),
                 ("speed.rungs", ladder.speed.rungs, rungs),
                 ("precision", list(ladder.precision), ["cpu", "cuda"])]  # fmt: skip
    mentioned += [("arms: rates_of", [a.rates_of for a in ladder.arms if a.rates_of], names)]
    if tuning is not None:
        check = [tuning.check] if tuning.check else []
        mentioned += [("tuning.rungs", tuning.rungs, rungs), ("tuning.arms", tuning.arms, names),
                      ("tuning.check", check, rungs),
                      ("tuning.rates", tuning.rates, list(hints_of(OptimizerConfig)))]  # fmt: skip
        if 1 not in tuning.factors:
            raise UserError(f"tuning.factors are {tuning.factors}: 1 must be among them")
        if len(tuning.limits) != 2 or tuning.limits[0] > tuning.limits[1]:
            raise UserError(f"tuning.limits are {tuning.limits}: give the lowest and the highest")
        for arm in ladder.arms:
            if (arm.rates_of or arm.name) not in tuning.arms:
                raise UserError(
                    f"arm {arm.name} is not tuned: name it in tuning.arms, or another arm's name "
                    "in its rates_of"
                )
    for where, given, known in mentioned:
        for name in given:
            if name not in known:
                raise UserError(f"{where} names {name}, but there are: {', '.join(known)}")
    if ladder.verdict.arm in ladder.verdict.controls:
        raise UserError(f"verdict.arm {ladder.verdict.arm} cannot be compared with itself")


def _check_values(arm: LadderArm) -> None:
    """Refuses an overlay that sets more than values: then nobody knows what made a difference."""
    named = arm.values.endswith((".yaml", ".yml"))
    overlay = find_recipe(arm.values if named else f"values/{arm.values}")
    for key in _dotted(read_yaml(overlay)):
        if not any(key == own or key.startswith(f"{own}.") for own in VALUE_KEYS):
            raise UserError(
                f"arm {arm.name} ({overlay}) sets {key}, but arms may differ in "
                f"{' and '.join(VALUE_KEYS)} alone"
            )


def _dotted(data: dict, path: str = "") -> list[str]:
    """All keys of nested mappings, dotted."""
    keys = []
    for key, value in data.items():
        here = f"{path}.{key}".lstrip(".")
        keys += _dotted(value, here) if isinstance(value, dict) and value else [here]
    return keys
