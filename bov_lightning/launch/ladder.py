"""`bov sweep --ladder`: the runs of a ladder's file, and how far they are."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bov_lightning.errors import UserError
from bov_lightning.planning.cost import make_plan
from bov_lightning.recipe.budget import accumulation
from bov_lightning.recipe.data_module import data_section
from bov_lightning.recipe.given import Given, read
from bov_lightning.recipe.ladder import Ladder, LadderArm, LadderRung
from bov_lightning.recipe.overlays import find_recipe, merge, split_options
from bov_lightning.recipe.sameness import plain
from bov_lightning.report.ladder_results import Result
from bov_lightning.report.tuning import DIGITS, factor_on

FREE = ("run.root", "data", "trainer.accelerator", "checkpoint", "guard")
"""Keys that may be given beside the ladder's file: they change nothing that is measured."""


@dataclass(frozen=True)
class Job:
    """One run."""

    name: str
    """Of its directory, and in runs.csv."""
    kind: str
    """tuning, check or rung."""
    rung: LadderRung
    arm: LadderArm
    seed: int
    rates: tuple[float, float] | None = None
    """What all rates, and table_lr besides, are multiplied by; None: what tuning says."""


class LadderRuns:
    """What a ladder's file trains, on this machine's kind of device."""

    def __init__(
        self, ladder: Ladder, options: list[str], text: dict[str, list[str]],
        rungs: list[str] | None = None,
    ):  # fmt: skip
        """
        Args:
            ladder: the file.
            options: dotted keys and values that all runs share.
            text: ``data`` and ``val_data``, as for `recipe.given.read`.
            rungs: the rungs that are to be run; None: all that a verdict needs.

        Raises:
            UserError: keys that the file decides, a rung that it lacks, a recipe that is wrong.
        """
        for key, _ in split_options(options):
            if not any(key == free or key.startswith(f"{free}.") for free in FREE):
                raise UserError(
                    f"--{key}: {ladder.path} decides that for all runs; beside it may be given "
                    f"{', '.join(FREE)}"
                )
        known = [rung.name for rung in ladder.rungs]
        for name in rungs or []:
            if name not in known:
                raise UserError(f"--rungs {name}: the rungs are {', '.join(known)}")
        self.ladder, self.options, self.text = ladder, options, text
        self.wanted = rungs or [rung.name for rung in ladder.rungs if not rung.optional]
        self._givens: dict[tuple[str, str], Given] = {}
        self._plans: dict[tuple[str, str], dict] = {}
        self._corpus: tuple[int, dict[str, str]] | None = None
        for rung in ladder.rungs:
            recipe = self.given_of(rung, ladder.arms[0]).recipe
            accumulation(rung.batch, rung.micro, recipe.model.config.sequence_len, 1)

    @cached_property
    def device(self) -> str:
        """Where runs are trained: cpu or cuda."""
        import torch

        trainer = self.first.recipe.trainer
        cpu = trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
        return "cpu" if cpu else "cuda"

    @property
    def first(self) -> Given:
        """The recipe on the lowest rung, for what all have in common."""
        return self.given_of(self.ladder.rungs[0], self.ladder.arms[0])

    @property
    def root(self) -> Path:
        """The folder of the runs."""
        return Path(self.first.recipe.run.root)

    @property
    def precision(self) -> str:
        """Of all runs."""
        own = self.first.recipe.trainer.get("precision", "32-true")
        return self.ladder.precision.get(self.device, own)

    def text_arguments(self) -> list[str]:
        """Of `bov prepare`, for the text that all runs share."""
        text = [
            x for key in ("data", "val_data") for name in self.text[key]
            for x in (f"--{key.replace('_', '-')}", name)
        ]  # fmt: skip
        shared = _pairs(_flat(self.ladder.settings))
        return ["--config", self.ladder.recipe, *text, *shared, *self.options]

    def corpus(self) -> tuple[int, dict[str, str]] | None:
        """Tokens of the training text, and fingerprints as `Result` has them; None: the text is
        not prepared yet."""
        if self._corpus is None:
            directory = Path(data_section(self.first)["init_args"]["directory"])
            try:
                manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
                rows = sum(shard["rows"] for shard in manifest["shards"]["train"])
                fingerprints = {
                    "text": manifest["settings"]["fingerprint"],
                    "tokenizer": manifest["tokenizer_hash"],
                    "val_rows": manifest["shards"]["val"][0]["sha256"][:16],
                }
            except (OSError, ValueError, KeyError, TypeError, IndexError):
                return None
            self._corpus = rows * self.first.recipe.model.config.sequence_len, fingerprints
        return self._corpus

    @property
    def corpus_tokens(self) -> int | None:
        """Tokens of the training text; None: it is not prepared yet."""
        found = self.corpus()
        return found and found[0]

    def jobs(self) -> list[Job]:
        """All of the file, in the order in which they are trained."""
        ladder, tuning, found = self.ladder, self.ladder.tuning, []

        def add(kind: str, rung: LadderRung, arm: LadderArm, seed: int, mark: str, rates) -> None:
            name = f"{ladder.name}-{rung.name}-{arm.name}{mark}-seed{seed}"
            found.append(Job(name, kind, rung, arm, seed, rates))

        if tuning is not None:
            for rung in map(ladder.rung, tuning.rungs):
                for arm in map(ladder.arm, tuning.arms):
                    for factor in tuning.factors:
                        add("tuning", rung, arm, tuning.seed, f"-rates{factor:g}", (factor, 1.0))
                    for factor in tuning.table_factors if self.has_tables(arm) else ():
                        add("tuning", rung, arm, tuning.seed, f"-table{factor:g}", (1.0, factor))
        for rung in ladder.rungs:
            if tuning is not None and tuning.check == rung.name:
                for arm in map(ladder.arm, tuning.arms):
                    add("check", rung, arm, tuning.seed, "-check", (1.0, 1.0))
            n_seed = max(len(ladder.seeds(arm.name, rung.name)) for arm in ladder.arms)
            for seed in range(n_seed):
                for arm in ladder.arms:
                    if seed in ladder.seeds(arm.name, rung.name):
                        add("rung", rung, arm, seed, "", None)
        return found

    def wanted_jobs(self) -> list[Job]:
        """Those of the rungs that are to be run, and what tunes their rates."""
        return [job for job in self.jobs() if job.kind == "tuning" or job.rung.name in self.wanted]

    def has_tables(self, arm: LadderArm) -> bool:
        """Whether the arm has value tables."""
        return self.plan_of(self.ladder.rungs[0], arm)["params"]["tables"] > 0

    def rates_of(self, job: Job, results: Sequence[Result]) -> tuple[float, float] | None:
        """What the job's rates are multiplied by; None: the runs that say so have not ended."""
        if job.rates is not None:
            return job.rates
        ladder, arm = self.ladder, job.arm.rates_of or job.arm.name
        rates = factor_on(ladder, results, arm, job.rung, tables=False)
        tables = 1.0
        if self.has_tables(job.arm) and self.has_tables(ladder.arm(arm)):
            tables = factor_on(ladder, results, arm, job.rung, tables=True)
        return None if rates is None or tables is None else (rates, tables)

    def given_of(self, rung: LadderRung, arm: LadderArm) -> Given:
        """The recipe of an arm on a rung, but for seed, rates and precision."""
        key = rung.name, arm.name
        if key not in self._givens:
            ladder = self.ladder
            own = arm.values if arm.values.endswith((".yaml", ".yml")) else f"values/{arm.values}"
            shape = {f"model.config.{name}": value for name, value in rung.config.items()}
            decided = [
                *_pairs(_flat(ladder.settings)), *self.options, *_pairs(shape),
                *_pairs({"model.budget.flops": rung.flops, "batch.tokens": rung.batch,
                         "batch.micro": rung.micro, "run.name": ladder.name}),
            ]  # fmt: skip
            self._givens[key] = read([ladder.recipe, str(find_recipe(own))], decided, **self.text)
        return self._givens[key]

    def plan_of(self, rung: LadderRung, arm: LadderArm) -> dict[str, Any]:
        """Costs of an arm on a rung, see `make_plan`."""
        key = rung.name, arm.name
        if key not in self._plans:
            recipe = self.given_of(rung, arm).recipe
            self._plans[key] = make_plan(recipe.model.config, recipe.model.budget, rung.batch)
        return self._plans[key]

    def given(self, job: Job, rates: tuple[float, float]) -> Given:
        """What `bov fit` trains."""
        base, tuning = self.given_of(job.rung, job.arm), self.ladder.tuning
        optimizer = base.recipe.model.optimizer
        changed = {name: getattr(optimizer, name) * rates[0] for name in
                   (tuning.rates if tuning else ())}  # fmt: skip
        changed["table_lr"] = changed.get("table_lr", optimizer.table_lr) * rates[1]
        trainer = {**base.recipe.trainer, "precision": self.precision}
        recipe = replace(
            base.recipe, seed=job.seed, trainer=trainer,
            run=replace(base.recipe.run, name=job.name),
            model=replace(base.recipe.model, optimizer=replace(optimizer, **changed)),
        )  # fmt: skip
        overlay = {"seed": job.seed, "run": {"name": job.name}, "trainer": trainer,
                   "model": {"optimizer": changed}}  # fmt: skip
        return replace(base, recipe=recipe, plain=merge(base.plain, overlay))

    def fingerprint(self, given: Given) -> str:
        """Of everything that the file decides about a run."""
        recipe = given.recipe
        model = {name: plain(value) for name, value in vars(recipe.model).items()}
        data = {k: v for k, v in data_section(given)["init_args"].items()
                if k in ("tokenizer", "packing")}  # fmt: skip
        content = [model, recipe.batch.tokens, recipe.seed, data, recipe.validation.tokens]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def check(self, results: dict[str, Result], folder: Path) -> None:
        """Refuses results of other settings, of another device or precision.

        Args:
            results: the ended runs by name.
            folder: where they are from.
        """
        own = {"device": self.device, "precision": self.precision}
        for job in self.jobs():
            result = results.get(job.name)
            if result is None:
                continue
            for name, value in own.items():
                if getattr(result, name) != value:
                    raise UserError(
                        f"{folder} holds runs of {name} {getattr(result, name)}, and here it would "
                        f"be {value}: they cannot be compared; give another --output"
                    )
            used, rates = (
                (result.rates, result.table_rates),
                self.rates_of(job, [*results.values()]),
            )
            # Another machine's arithmetic may round a factor otherwise.
            same = rates is not None and np.allclose(used, rates, rtol=0, atol=2 * 10.0**-DIGITS)
            if not same or self.fingerprint(self.given(job, used)) != result.recipe:
                raise UserError(
                    f"{folder}: {job.name} was trained otherwise than {self.ladder.path} says now: "
                    "give another --output, or remove its line from runs.csv to train it again"
                )


def _flat(data: dict, path: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in data.items():
        here = f"{path}.{key}".lstrip(".")
        flat |= _flat(value, here) if isinstance(value, dict) and value else {here: value}
    return flat


def _pairs(keys: dict[str, Any]) -> list[str]:
    """Dotted keys as options of a command line."""
    return [
        x for key, value in keys.items()
        for x in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]  # fmt: skip
