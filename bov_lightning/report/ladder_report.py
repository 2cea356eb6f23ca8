"""The report of a ladder: its verdict, by the rules of its file, and every number behind it."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bov_lightning.errors import UserError
from bov_lightning.recipe.ladder import Ladder
from bov_lightning.report.content import Cell, Column, Plot, Report, Section, Series, Table
from bov_lightning.report.effective_compute import (
    N_DRAW,
    EffectiveCompute,
    Rung,
    effective_compute,
)
from bov_lightning.report.ladder_results import (
    RUNS,
    Result,
    Speed,
    of_rungs,
    read_results,
    read_speeds,
    refuse_a_baseline_without_numbers,
)
from bov_lightning.report.statistics import Estimate, difference, mean
from bov_lightning.report.tuning import factor_on, tried
from bov_lightning.report.verdict import Checked, Numbers, Tuned, Verdict, decide

TRAINED = "rung"
"""The kind of runs that multipliers come from."""


class Study:
    """A ladder's file, and what was measured of it."""

    def __init__(
        self, ladder: Ladder, results: Sequence[Result], speeds: Sequence[Speed] = (),
        n_draw: int = N_DRAW,
    ):  # fmt: skip
        """
        Args:
            ladder: the file.
            results: of all runs that have ended.
            speeds: of the arms, for equal time.
            n_draw: draws of which intervals are made.

        Raises:
            UserError: a run of the baseline without a number.
        """
        refuse_a_baseline_without_numbers(ladder, results)
        names = [arm.name for arm in ladder.arms]
        self.ladder, self.names, self.n_draw = ladder, names, n_draw
        self.results = [r for r in results if r.arm in names]
        self.speed = {(s.arm, s.rung): s.flops_per_second for s in speeds}

    def losses(self, arm: str, rung: str) -> dict[int, float]:
        """Bits per byte by seed."""
        runs = of_rungs(self.results, arm, rung)
        return {s: runs[s].val_bpb for s in sorted(runs) if math.isfinite(runs[s].val_bpb)}

    def missing(self, arm: str, rung: str) -> list[int]:
        """Seeds of the file without a run."""
        return [
            s for s in self.ladder.seeds(arm, rung) if s not in of_rungs(self.results, arm, rung)
        ]

    def rungs_of(self, arm: str) -> dict[str, Rung]:
        """Where the arm was trained, for `effective_compute`."""
        found = {}
        for rung in self.ladder.rungs:
            if losses := self.losses(arm, rung.name):
                flops = float(
                    np.mean([r.flops for r in of_rungs(self.results, arm, rung.name).values()])
                )
                found[rung.name] = Rung(flops, losses, self.speed.get((arm, rung.name)))
        return found

    def compared(
        self, arm: str, control: str, only: Sequence[str] | None = None
    ) -> tuple[list[str], EffectiveCompute] | None:
        """Multipliers of an arm to another, and on which rungs; None: there are none.

        Args:
            arm: the arm.
            control: the arm whose curve is taken.
            only: the rungs that count; None: all that both were trained on.
        """
        base, ours = self.rungs_of(control), self.rungs_of(arm)
        if only is not None:
            base = {name: rung for name, rung in base.items() if name in only}
        shared = [name for name in base if name in ours]
        row = [ours.get(name) for name in base]
        found = effective_compute(list(base.values()), row, self.n_draw)
        return found and (shared, found)

    def counted(self) -> tuple[list[str], list[str]]:
        """The rungs that count for the verdict, and what is missing on those that have to."""
        rules, rungs, missing = self.ladder.verdict, [], []
        for rung in self.ladder.rungs:
            lacking = {}
            for arm in (rules.arm, *rules.controls):
                seeds = self.ladder.seeds(arm, rung.name)
                lost = [s for s in seeds if s not in self.losses(arm, rung.name)]
                if lost or not seeds:
                    lacking[arm] = lost
            if not lacking:
                rungs.append(rung.name)
            elif not rung.optional:
                told = ", ".join(
                    f"{arm} (seed{'s' * (len(lost) > 1)} {', '.join(map(str, lost))})" if lost
                    else f"{arm} (no seeds in the file)"
                    for arm, lost in lacking.items()
                )  # fmt: skip
                missing.append(f"{rung.name} of {told}")
        return rungs, missing

    def tuned(self, control: str) -> Tuned | None:
        """What tuning does to the multiplier, on the highest rung that was tuned."""
        tuning, arm = self.ladder.tuning, self.ladder.verdict.arm
        if tuning is None or not tuning.rungs or not {arm, control} <= set(tuning.arms):
            return None
        rung = max(tuning.rungs, key=lambda name: self.ladder.rung(name).flops)
        ours, theirs = self.best(arm, rung), self.best(control, rung)
        found = self.compared(arm, control)
        if ours is None or theirs is None or found is None:
            return None
        law = found[1].law
        return Tuned(
            rung, law.multiplier(theirs[0], ours[0]), law.multiplier(theirs[1], ours[1])
        )  # fmt: skip

    def best(self, arm: str, rung: str) -> tuple[float, float] | None:
        """Losses of an arm on a tuned rung at untuned rates and at the best ones."""
        rates = tried(self.ladder, self.results, arm, rung, tables=False)
        if rates is None:
            return None
        alone = tried(self.ladder, self.results, arm, rung, tables=True)
        lowest = min(found.loss for found in (rates, alone) if found is not None)
        return rates.losses[1.0], lowest

    def verdict(self) -> Verdict:
        """By the file's rules."""
        rules = self.ladder.verdict
        rungs, missing = self.counted()
        found = {name: self.compared(rules.arm, name, rungs) for name in rules.controls}
        multipliers = {
            name: dict(zip(each[0], (r.equal_flops for r in each[1].rungs), strict=True))
            for name, each in found.items() if each
        }  # fmt: skip
        slopes = {name: each[1].slope for name, each in found.items() if each}
        tuned = {name: self.tuned(name) for name in rules.controls}
        return decide(rules, Numbers(multipliers, slopes, tuned, tuple(missing)))


def write_ladder_report(ladder: Ladder, folder: Path) -> str:
    """Writes report.md, report.html and the plots beside runs.csv.

    Returns:
        The verdict, in two lines.

    Raises:
        UserError: no runs, or runs that no multiplier can be taken to.
    """
    from bov_lightning.report.page import WRITERS

    results = list(read_results(folder).values())
    if not results:
        raise UserError(f"{folder / RUNS} holds no runs: without --report they are trained")
    study = Study(ladder, results, read_speeds(folder))
    report = make_ladder_report(study)
    for format, output in (("md", folder / "report.md"), ("html", folder / "report.html"),
                           ("png", folder)):  # fmt: skip
        WRITERS[format](report, output)
    return f"{report.summary}\n{folder / 'report.html'}"


def make_ladder_report(study: Study) -> Report:
    """Everything that the ladder has to say."""
    ladder, verdict = study.ladder, study.verdict()
    sections = [
        Section("Verdict", [*finding(study, verdict), *warnings(study)],
                [_conditions(verdict), *_left_out(study)]),
        Section("Effective compute", [], _effective(study), _pairs(study)),
        Section("Bits per byte", [], [_losses(study), _gaps(study), *_curves(study)],
                dict(enumerate(study.names))),
    ]  # fmt: skip
    if ladder.tuning is not None:
        sections.append(Section("Learning rates", [_tuning_text(study)], _tuning(study)))
    sections.append(Section("Cost", [], [_cost(study), _runs(study)]))
    return Report(f"A ladder of sizes: {ladder.name}", _headline(study, verdict), sections)


def _headline(study: Study, verdict: Verdict) -> str:
    return f"Verdict: {verdict.word}. Hypothesis: {study.ladder.hypothesis.rstrip('.')}"


def finding(study: Study, verdict: Verdict) -> list[str]:
    """The result, in two sentences."""
    rules = study.ladder.verdict
    held = f"By the rules that {study.ladder.path.name} held before the runs"
    said = f"{held}, this is {verdict.word}: {verdict.reason}."
    parts = []
    for name in rules.controls:
        found = study.compared(rules.arm, name)
        if found is None:
            continue
        numbers = [
            f"{_short(r.equal_flops)} (at {rung})"
            for rung, r in zip(found[0], found[1].rungs, strict=True)
        ]
        parts.append(f"{name} would need {', '.join(numbers)} times the compute")
    if not parts:
        return [said]
    told = f"For the loss that {rules.arm} reaches, {', and '.join(parts)}"
    return [f"{told} (in brackets 95% intervals, over seeds and the curve's fit).", said]


def _short(m: Estimate) -> str:
    interval = f" [{m.low:.2f}, {m.high:.2f}]" if m.has_interval else ""
    return f"{m.value:.2f}{interval}"


def warnings(study: Study) -> list[str]:
    """What must be known beside the verdict; nothing where there is nothing."""
    ladder, results = study.ladder, study.results
    said = []
    many = {r.rung: max(x.epochs for x in results if x.rung == r.rung) for r in results}
    if over := [f"{rung} ({n:.1f})" for rung, n in many.items() if n > ladder.max_epochs]:
        said.append(
            f"Warning: more than {ladder.max_epochs:g} passes over the text at {', '.join(over)}: "
            "tables may have learned it by heart."
        )
    if changed := [r.run for r in results if r.ladder != ladder.digest]:
        said.append(
            f"Warning: {ladder.path.name} has changed since {len(changed)} of {len(results)} runs: "
            "its rules were not all written down before them."
        )
    if diverged := [r.run for r in results if not math.isfinite(r.val_bpb)]:
        said.append(f"Diverged, and without a number: {', '.join(diverged)}.")
    return said


def _conditions(verdict: Verdict) -> Table:
    def line(of: str, checked: Checked) -> list[Cell]:
        holds = {True: "yes", False: "no", None: "not known"}[checked.holds]
        c = checked.condition
        where = {"every": "every rung", "top": "top rung"}[c.rungs]
        if c.rule in ("slope_interval_reaches", "tuning_takes_multiplier_to"):
            where = "-"
        return [of, checked.words, ", ".join(c.against), where, holds, checked.said]

    lines = [line("supported: all of", c) for c in verdict.supported]
    lines += [line("refuted: any of", c) for c in verdict.refuted]
    columns = [Column(x) for x in ("for", "condition", "against", "where", "holds", "numbers")]
    note = "The highest rung that was run with all arms and seeds is the top one."
    return Table("conditions", "The rules, one by one", columns, lines, note)


def _left_out(study: Study) -> list[Table]:
    """Rungs that were not run, by name."""
    lines: list[list[Cell]] = []
    for rung in study.ladder.rungs:
        for arm in study.names:
            wanted, lost = study.ladder.seeds(arm, rung.name), study.missing(arm, rung.name)
            if lost:
                what = "all" if lost == wanted else ", ".join(map(str, lost))
                needed = "no" if rung.optional else "yes"
                lines.append([rung.name, arm, what, needed])
    columns = [Column("rung"), Column("arm"), Column("seeds"), Column("needed for the verdict")]
    return [Table("not_run", "Not run", columns, lines)] if lines else []


def _pairs(study: Study) -> dict[int, str]:
    """What the hypothesis compares, by the index of its colour."""
    rules = study.ladder.verdict
    return {i: f"{rules.arm} against {name}" for i, name in enumerate(rules.controls)}


def _effective(study: Study) -> list[Table | Plot]:
    ladder = study.ladder
    lines: list[list[Cell]] = []
    trends: list[list[Cell]] = []
    series, told, notes, shown = [], [], {}, _pairs(study)
    pairs = [(ladder.verdict.arm, name) for name in ladder.verdict.controls]
    pairs += [(name, ladder.baseline) for name in study.names if name != ladder.baseline]
    for index, (arm, control) in enumerate(dict.fromkeys(pairs)):
        found = study.compared(arm, control)
        if found is None:
            continue
        rungs, result = found
        for rung, r in zip(rungs, result.rungs, strict=True):
            lines.append([arm, control, rung, r.flops, r.equal_flops, r.equal_time])
            m = r.equal_flops
            if index in shown and math.isfinite(m.value):
                point = np.array([r.flops]), np.array([m.value])
                series.append(Series(shown[index], index, *point, m.low, m.high))
        if result.slope is not None:
            trends.append([arm, control, result.slope])
        if result.warning:
            notes[f"to {control}: {result.warning}"] = None
        if index in shown:
            told.append(f"{shown[index]} {result.rungs[0].equal_flops.value:.2f} at {rungs[0]} "
                        f"to {result.rungs[-1].equal_flops.value:.2f} at {rungs[-1]}")  # fmt: skip
    if not lines:
        return []
    columns = [
        Column("arm"), Column("against"), Column("rung"), Column("FLOPs", ".2e"),
        Column("compute multiplier", ".3f", estimates=True),
        Column("at equal time", ".3f", estimates=True),
    ]  # fmt: skip
    note = (
        "How much compute the arm in the second column would need for the loss that the first one "
        "reaches, over the first one's own. Intervals are of 95%, over seeds and fit. Equal time: "
        "times their speeds, measured in turn on one thread of a CPU."
    )
    note += "".join(f" Beware, {text}." for text in notes)
    items: list[Table | Plot] = [
        Table("effective_compute", "Compute multipliers", columns, lines, note)
    ]
    if trends:
        items.append(Table(
            "trend", "Does the gain last?",
            [Column("arm"), Column("against"),
             Column("slope of log multiplier", "+.3f", estimates=True)], trends,
            "Per e-fold of compute. An interval below zero: the gain shrinks with scale.",
        ))  # fmt: skip
    items += [] if not series else [Plot(
        "multiplier", "Effective compute",
        f"Compute that the other arm needs for the same loss, in multiples: {'; '.join(told)}.",
        "FLOPs", "multiplier", series, "points", shown,
        note="Bars are 95% intervals; at 1 both need the same.",
    )]  # fmt: skip
    return items


def _losses(study: Study) -> Table:
    ladder, base = study.ladder, study.ladder.baseline
    columns = [
        Column("rung"), Column("arm"), Column("seeds"), Column("val bpb", ".4f", estimates=True),
        Column(f"difference to {base}", "+.4f", estimates=True), Column("steps", ",d"),
        Column("tokens", ",d"), Column("FLOPs", ".2e"), Column("parameters", ",d"),
        Column("in tables", ",d"), Column("epochs", ".2f"),
    ]  # fmt: skip
    lines: list[list[Cell]] = []
    for rung in ladder.rungs:
        theirs = study.losses(base, rung.name)
        for arm in study.names:
            ours = study.losses(arm, rung.name)
            if not ours:
                continue
            one = next(iter(of_rungs(study.results, arm, rung.name).values()))
            off = difference(ours, theirs) if theirs and arm != base else None
            lines.append([
                rung.name, arm, ", ".join(map(str, ours)), mean(list(ours.values())), off,
                one.steps, one.tokens, one.flops, one.parameters, one.tables, one.epochs,
            ])  # fmt: skip
    note = "95% intervals of the t distribution over seeds; differences are paired."
    return Table("losses", "Bits per byte at the end", columns, lines, note)


def _gaps(study: Study) -> Table:
    """What an arm has learned by heart shows where its own text is easier than it is for others."""
    base = study.ladder.baseline
    columns = [
        Column("rung"), Column("arm"), Column("train bpb", ".4f"), Column("val bpb", ".4f"),
        Column("gap", "+.4f", estimates=True),
        Column(f"gap less that of {base}", "+.4f", estimates=True),
    ]  # fmt: skip
    lines: list[list[Cell]] = []
    for rung in study.ladder.rungs:
        gaps = {}
        for arm in study.names:
            runs = [r for r in of_rungs(study.results, arm, rung.name).values()
                    if math.isfinite(r.val_bpb)]  # fmt: skip
            gaps[arm] = {r.seed: r.val_bpb - r.train_bpb for r in runs}
            if not runs:
                continue
            more = difference(gaps[arm], gaps[base]) if gaps.get(base) and arm != base else None
            lines.append([
                rung.name, arm, float(np.mean([r.train_bpb for r in runs])),
                float(np.mean([r.val_bpb for r in runs])), mean(list(gaps[arm].values())), more,
            ])  # fmt: skip
    return Table(
        "gaps", "Text that was trained on against held-out text", columns, lines,
        "Both at the end of training, over equally many tokens; those trained on are spread over "
        "all that the run has seen.",
    )  # fmt: skip


def _curves(study: Study) -> list[Plot]:
    series, rows = [], {}
    for index, arm in enumerate(study.names):
        found = study.rungs_of(arm)
        if not found:
            continue
        rows[index] = arm
        for rung in found.values():
            m = mean(list(rung.losses.values()))
            point = np.array([rung.flops]), np.array([m.value])
            series.append(Series(arm, index, *point))
    if not series:
        return []
    return [Plot("losses_plot", "Bits per byte against compute",
                 "Mean bits per byte of each arm on each rung.", "FLOPs", "val_bpb", series,
                 "points", rows)]  # fmt: skip


def _tuning_text(study: Study) -> str:
    tuning = study.ladder.tuning
    table = f", table_lr alone by {', '.join(f'{f:g}' for f in tuning.table_factors)}"
    return (
        f"On {', '.join(tuning.rungs)} the rates ({', '.join(tuning.rates)}) of "
        f"{', '.join(tuning.arms)} were multiplied by {', '.join(f'{f:g}' for f in tuning.factors)}"
        f"{table if tuning.table_factors else ''}, one run of seed {tuning.seed} each. The best "
        "factor is the lowest point of a parabola over its logarithm; on the other rungs a line "
        f"through the best ones is followed, within {tuning.limits[0]:g} and {tuning.limits[1]:g}."
    )


def _tuning(study: Study) -> list[Table]:
    ladder, results = study.ladder, study.results
    tuning = ladder.tuning
    lines: list[list[Cell]] = []
    for name in tuning.rungs:
        for arm in tuning.arms:
            for tables in (False, True):
                best = tried(ladder, results, arm, name, tables)
                if best is None:
                    continue
                losses = ", ".join(f"{f:g}: {x:.4f}" for f, x in sorted(best.losses.items()))
                gain = best.loss - best.losses[1.0]
                what = "table_lr" if tables else "all rates"
                lines.append([name, arm, what, losses, best.factor, gain])
    columns = [Column("rung"), Column("arm"), Column("what"), Column("val bpb by factor"),
               Column("best factor", ".3f"), Column("val bpb gained", "+.4f")]  # fmt: skip
    found = [Table("tuning", "What was tried", columns, lines)]
    used: list[list[Cell]] = []
    for rung in ladder.rungs:
        for arm in tuning.arms:
            factors = [factor_on(ladder, results, arm, rung, tables) for tables in (False, True)]
            check = of_rungs(results, arm, rung.name, "check")
            ours = study.losses(arm, rung.name)
            change = (
                difference(ours, {s: r.val_bpb for s, r in check.items()})
                if check and ours
                else None
            )
            used.append([rung.name, arm, *factors, None if change is None else change.value])
    columns = [Column("rung"), Column("arm"), Column("all rates", ".3f"), Column("table_lr", ".3f"),
               Column("val bpb minus untuned", "+.4f")]  # fmt: skip
    note = "The last column is of the run that checks, where there is one."
    found.append(Table("rates", "What was used", columns, used, note))
    for control in ladder.verdict.controls:
        if (t := study.tuned(control)) is not None:
            found.append(Table(
                f"tuned_{control}", f"What tuning does to the multiplier to {control}",
                [Column("rung"), Column("untuned", ".3f"), Column("each at its best", ".3f")],
                [[t.rung, t.untuned, t.tuned]], "One seed each.",
            ))  # fmt: skip
    return found


def _cost(study: Study) -> Table:
    lines: list[list[Cell]] = []
    kinds = {"tuning": "tuning", "check": "check", TRAINED: "seeds"}
    for rung in study.ladder.rungs:
        for kind, called in kinds.items():
            runs = [r for r in study.results if (r.rung, r.kind) == (rung.name, kind)]
            if runs:
                lines.append([rung.name, called, len(runs), sum(r.flops for r in runs),
                              sum(r.seconds for r in runs) / 3600])  # fmt: skip
    columns = [Column("rung"), Column("what"), Column("runs", ",d"), Column("FLOPs", ".2e"),
               Column("hours", ".3f")]  # fmt: skip
    note = "Hours of all runs one after the other, though several shared a device."
    return Table("cost", "What it took", columns, lines, note)


def _runs(study: Study) -> Table:
    columns = [
        Column("run"), Column("kind"), Column("rates", ".3g"), Column("table_lr", ".3g"),
        Column("val bpb", ".4f"), Column("train bpb", ".4f"), Column("steps", ",d"),
        Column("seconds", ".1f"), Column("device"), Column("commit"),
    ]  # fmt: skip
    lines: list[list[Cell]] = [
        [r.run, r.kind, r.rates, r.table_rates, r.val_bpb, r.train_bpb, r.steps, r.seconds,
         f"{r.device} {r.precision}", r.commit[:9]]
        for r in study.results
    ]  # fmt: skip
    return Table("runs", "Every run", columns, lines)
