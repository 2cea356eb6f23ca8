"""Runs benchmarks on a model and leaves everything else as it was."""

import contextlib
import difflib
import io
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from torch import nn

from bov_lightning.distributed.ranks import Ranks
from bov_lightning.distributed.sharding import reshard
from bov_lightning.errors import UserError
from evaluation.backends import Backend
from evaluation.data import download
from evaluation.lm import BatchedLM
from evaluation.scorer import CoreTask

TASKS = Path(__file__).parent / "tasks"
"""The folder for ``lm_eval --include_path``."""
OURS = ("core_", "heldout")
"""What the names of our tasks begin with."""
FEWSHOT_SEED = 1234
"""What lm-eval's own command line seeds the few-shot examples of its tasks with."""
BOOTSTRAP = 1000
"""Resamples for the standard errors that have no formula."""


@dataclass(frozen=True)
class Benchmarks:
    """What to measure, and on how much."""

    tasks: tuple[str, ...] = ("core_paper",)
    """Names of tasks and groups, ours or lm-eval's."""
    max_per_task: int | None = None
    """Rows per task; None: all."""
    data_dir: str | None = None
    """Where the CORE files lie."""
    include_path: str | None = None
    """A folder of further lm-eval tasks; their code runs."""
    heldout_dir: str | None = None
    """Where the tasks made of a run's own held-out documents lie."""
    time_limit: float | None = None
    """Seconds per task."""

    @property
    def settings(self) -> dict[str, Any]:
        """What tells two evaluations of one checkpoint apart."""
        return {
            "tasks": sorted(self.tasks),
            "max_per_task": self.max_per_task,
            "time_limit": self.time_limit,
        }


@dataclass
class Runtime:
    """How to measure: nothing in here changes a score."""

    budget: int | None = None
    """Tokens per forward pass; None: what suits the device."""
    share_prefix: bool = True
    should_stop: Callable[[], bool] = lambda: False
    """Asked on every rank between batches."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Takes finished and total rows of this rank."""
    ranks: Ranks = field(default_factory=Ranks.of_job)


@lru_cache(maxsize=4)
def _manager(benchmarks: Benchmarks, include_defaults: bool) -> TaskManager:
    metadata = {"data_dir": benchmarks.data_dir, "max_per_task": benchmarks.max_per_task,
                "heldout_dir": benchmarks.heldout_dir}  # fmt: skip
    paths = [TASKS, *([Path(benchmarks.include_path)] if benchmarks.include_path else [])]
    return TaskManager(
        include_path=paths,
        include_defaults=include_defaults,
        metadata={name: value for name, value in metadata.items() if value is not None},
    )


def load_tasks(benchmarks: Benchmarks) -> dict[str, dict]:
    """The tasks and groups as `lm_eval.evaluator.evaluate` takes them.

    Raises:
        UserError: an unknown name, or data files that are missing or altered.
    """
    if not benchmarks.tasks:
        raise UserError("no tasks: name some with --tasks, such as core_paper")
    if benchmarks.include_path and not Path(benchmarks.include_path).is_dir():
        raise UserError(f"--include-path {benchmarks.include_path} is no folder")
    manager = _manager(benchmarks, include_defaults=False)
    foreign = set(benchmarks.tasks) - set(manager.all_tasks)
    if foreign and not any(name.startswith(OURS) for name in foreign):
        # lm-eval's own thousands of YAML files take it half a minute to read.
        manager = _manager(benchmarks, include_defaults=True)
    loaded: dict[str, dict] = {"tasks": {}, "groups": {}}
    for name in benchmarks.tasks:
        if name not in manager.all_tasks:
            raise _unknown_task(name, manager.all_tasks)
        # One by one: lm-eval refuses two groups of the same tasks, which then are run once.
        try:
            part = manager.load(name)
        except (OSError, ImportError, RuntimeError) as error:
            detail = " ".join(str(error).split())
            raise UserError(f"task {name} cannot be loaded: {detail}") from error
        loaded["tasks"].update(part["tasks"])
        loaded["groups"].update(part.get("groups", {}))
    for name, task in loaded["tasks"].items():
        if not isinstance(task, CoreTask):
            task.set_fewshot_seed(FEWSHOT_SEED)
        if next(iter(task.eval_docs), None) is None:
            raise UserError(f"task {name} has no rows, of which no mean can be taken")
    return loaded


def _unknown_task(name: str, known: list[str]) -> UserError:
    ours = [k for k in known if k.startswith(OURS)]
    close = difflib.get_close_matches(name, ours, n=2, cutoff=0.6)
    close += [k for k in ours if k == f"core_{name}" and k not in close]
    close += [k for k in difflib.get_close_matches(name, known, n=3) if k not in close]
    hint = f"did you mean {' or '.join(close[:4])}?" if close else f"ours: {', '.join(ours)}"
    return UserError(f"unknown task {name!r}: {hint}")


def download_data(benchmarks: Benchmarks, report: Callable[[str], None]) -> None:
    """Fetches the CORE files that the tasks need, once for all ranks of a machine."""
    from lm_eval.tasks._yaml_loader import load_yaml

    known = {}
    for path in sorted((TASKS / "core").glob("[!_]*.yaml")):
        settings = load_yaml(path, resolve_func=False)
        known[settings["metadata"]["file"]] = settings["metadata"]["sha256"]
    download(benchmarks.data_dir, known, report)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluates inside; random states, train modes and gradients are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    model.eval()
    try:
        # Ragged batches would make compiled blocks compile again and again.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        reshard(model)


def run(
    model: nn.Module,
    backend: Backend,
    tokenizer: Any,
    benchmarks: Benchmarks,
    runtime: Runtime | None = None,
    tasks: dict[str, dict] | None = None,
) -> dict[str, Any]:
    """Evaluates a model; every rank must call it, and every rank gets the results.

    Args:
        model: whose modes are put back afterwards.
        backend: calls the model.
        tokenizer: a ``transformers`` tokenizer.
        benchmarks: what to measure.
        runtime: how.
        tasks: what `load_tasks` gave, if it was called already.

    Returns:
        What lm-eval's `evaluate` returns, with ``samples``, and under ``evaluation``: settings,
        seconds and rows per task, prompts that were cropped, answers that the context cut off,
        rows that a time limit left out, and how the model had to be computed.

    Raises:
        UserError: unknown tasks or unusable data.
        EvaluationInterruptedError: ``should_stop`` said so; nothing is left behind.
        RankFailedError: another rank failed.
    """
    runtime = runtime or Runtime()
    started = time.time()
    with untouched(model), _quiet(runtime.ranks.rank):
        lm = runtime.ranks.together(
            lambda: BatchedLM(
                backend, tokenizer, budget=runtime.budget, share_prefix=runtime.share_prefix,
                time_limit=benchmarks.time_limit, should_stop=runtime.should_stop,
                progress=runtime.progress, ranks=runtime.ranks,
            )
        )  # fmt: skip
        loaded = runtime.ranks.together(lambda: tasks or load_tasks(benchmarks))
        for name, task in loaded["tasks"].items():
            _leave_out_unscored(name, task, lm)
        lm.engine.prepare()
        results = evaluate(
            lm, loaded, limit=benchmarks.max_per_task, bootstrap_iters=BOOTSTRAP, log_samples=True
        )
    for samples in results["samples"].values():
        samples.sort(key=lambda sample: sample["doc_id"])
    _drop_incomplete_groups(results)
    results["date"] = started
    results["evaluation"] = {
        "settings": benchmarks.settings,
        "seconds": {task: round(spent, 3) for task, spent in lm.seconds.items()},
        "cropped_prompts": _total(runtime.ranks, lm.counts.cropped),
        "cut_answers": _total(runtime.ranks, lm.counts.limited),
        "rows_left_out": lm.counts.unscored,
        "fewer_shots": {
            name: task.n_shot
            for name, task in loaded["tasks"].items()
            if isinstance(task, CoreTask) and task.n_shot < task.config.num_fewshot
        },
        "max_length": backend.max_length,
        "notes": lm.engine.notes,
    }
    return results


def _total(ranks: Ranks, counts: dict[str, int]) -> dict[str, int]:
    """Counts of all ranks, by task."""
    total: Counter[str] = Counter()
    for part in ranks.gather(counts):
        total.update(part)
    return dict(total)


@contextlib.contextmanager
def _quiet(rank: int) -> Iterator[None]:
    """Keeps lm-eval's chatter to warnings, and its bars to rank 0."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()) if rank else contextlib.nullcontext():
            yield
    finally:
        logger.setLevel(level)


def _leave_out_unscored(name: str, task: Task, lm: BatchedLM) -> None:
    """Makes lm-eval pass over the rows of a task that a time limit left unscored."""
    apply_filters, doc_iterator = task.apply_filters, task.doc_iterator

    def apply_to_scored():
        task._instances = [i for i in task._instances if (name, i.doc_id) not in lm.unscored]
        return apply_filters()

    def scored_documents(**kwargs):
        return (pair for pair in doc_iterator(**kwargs) if (name, pair[0]) not in lm.unscored)

    task.apply_filters, task.doc_iterator = apply_to_scored, scored_documents


def _drop_incomplete_groups(results: dict[str, Any]) -> None:
    """A group without one of its tasks' rows has no mean."""
    for group in results.get("groups", {}).values():
        for name in [n for n, value in group.items() if value is None]:
            del group[name]
