"""What a ladder costs, before it is run."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bov_lightning.launch.ladder import Job, LadderRuns
from bov_lightning.launch.ladder_speed import measure
from bov_lightning.model.counting import scaling_parameters
from bov_lightning.recipe.given import Given
from bov_lightning.report.ladder_results import Result, Speed


@dataclass
class Costs:
    """FLOPs per second, for estimates, and where they are from."""

    by_arm: dict[tuple[str, str], float]
    """By arm and rung, where that was measured."""
    otherwise: float
    source: str

    def hours(self, runs: LadderRuns, job: Job) -> float:
        """What a run takes, alone."""
        flops = runs.plan_of(job.rung, job.arm)["flops"]
        return flops / self.by_arm.get((job.arm.name, job.rung.name), self.otherwise) / 3600


def costs(
    runs: LadderRuns, results: Sequence[Result], speeds: Sequence[Speed], given: float | None
) -> Costs:
    """What is known of this machine's speed: what is given, else runs that have ended here, else
    speed.csv on a CPU, else a few steps now, of the baseline on the lowest rung."""
    if given is not None:
        return Costs({}, given, "as given")
    ended = [r for r in results if r.seconds > 0]
    if ended:
        known = {(r.arm, r.rung): r.flops / r.seconds for r in ended}
        return Costs(known, list(known.values())[-1], "from the runs that have ended")
    if speeds and runs.device == "cpu":
        known = {(s.arm, s.rung): s.flops_per_second for s in speeds}
        return Costs(known, list(known.values())[-1], "from speed.csv")
    arm = runs.ladder.arm(runs.ladder.baseline)
    (found,) = measure(runs, runs.ladder.rungs[0], [arm], 3, runs.device)
    return Costs({}, found.flops_per_second, "from a few steps on the lowest rung, measured now")


def print_plan(
    runs: LadderRuns, results: dict[str, Result], known: Costs, n_worker: int, console: Console
) -> None:
    """What is going to be trained, what it costs, and how far it is."""
    table = Table(box=None, header_style="bold")
    columns = ("rung", "arm", "what", "runs", "finished", "steps", "tokens", "per parameter",
               "epochs", "parameters", "in tables", "hours left")  # fmt: skip
    for name in columns:
        left = name in ("rung", "arm", "what")
        table.add_column(name, justify="left" if left else "right", no_wrap=True,
                         overflow="ignore")  # fmt: skip
    total, groups = 0.0, {}
    for job in runs.wanted_jobs():
        groups.setdefault((job.rung.name, job.arm.name, job.kind), []).append(job)
    for (rung, arm, kind), jobs in groups.items():
        plan, first = runs.plan_of(jobs[0].rung, jobs[0].arm), jobs[0]
        left = [job for job in jobs if job.name not in results]
        hours = sum(known.hours(runs, job) for job in left)
        total += hours
        n_epoch = (
            "-" if runs.corpus_tokens is None else f"{plan['tokens'] / runs.corpus_tokens:.2f}"
        )
        per = plan["tokens"] / _matrix_parameters(runs.given_of(first.rung, first.arm))
        table.add_row(
            rung, arm, {"rung": "seeds"}.get(kind, kind), str(len(jobs)),
            str(len(jobs) - len(left)),
            f"{plan['iterations']:,}", f"{plan['tokens']:,}", f"{per:.1f}", n_epoch,
            f"{plan['params']['live']:,}", f"{plan['params']['tables']:,}", f"{hours:.2f}",
        )  # fmt: skip
    console.print(table, soft_wrap=True)
    jobs = runs.wanted_jobs()
    n_done = sum(job.name in results for job in jobs)
    console.print(
        f"{n_done} of {len(jobs)} runs finished; about {total:.2f} hours of one "
        f"{'core' if runs.device == 'cpu' else 'GPU'} left, {total / n_worker:.2f} with "
        f"--jobs {n_worker} where each is as fast as alone, at {known.otherwise:.3g} FLOPs per "
        f"second ({known.source}); {runs.precision} on {runs.device}", soft_wrap=True,
    )  # fmt: skip
    for line in too_many_epochs(runs):
        console.print(line, soft_wrap=True)


def _matrix_parameters(given: Given) -> int:
    """Of blocks and head with standard values of that width: what 'tokens per parameter' means."""
    config = given.recipe.model.config
    return scaling_parameters(dataclasses.replace(config, d_mlp=None))


def too_many_epochs(runs: LadderRuns) -> list[str]:
    """A warning for every rung whose budget reads the text more often than the file allows."""
    if runs.corpus_tokens is None:
        return []
    said = []
    for name in runs.wanted:
        rung = runs.ladder.rung(name)
        tokens = max(runs.plan_of(rung, arm)["tokens"] for arm in runs.ladder.arms
                     if runs.ladder.seeds(arm.name, name))  # fmt: skip
        if tokens > runs.ladder.max_epochs * runs.corpus_tokens:
            said.append(
                f"warning: {name} reads the text of {runs.corpus_tokens:,} tokens "
                f"{tokens / runs.corpus_tokens:.1f} times: tables may learn it by heart; give more "
                "text, or a smaller budget"
            )
    return said
