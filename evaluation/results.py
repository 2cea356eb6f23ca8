"""Results on disk, in lm-eval's own files: complete, or not there.

RUN/eval/step-00000100/
    results_DATE.json        all numbers; moved there last, so its presence means complete
    samples_TASK_DATE.jsonl  every row: prompt, answers, outcome
RUN/eval/metrics.csv         one line per evaluated step, made anew from the results
"""

import copy
import csv
import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from bov_lightning import claims
from bov_lightning.checkpoint.directory import step_name, step_of
from bov_lightning.errors import StorageError, UserError
from bov_lightning.files import file_error, write_file
from bov_lightning.run.directory import EVAL, RunDirectory

HELDOUT = "heldout"
"""In the folder of all evaluations: the tasks made of the run's held-out text."""


def step_directory(run: Path, step: int) -> Path:
    """Where the results of a step lie."""
    return RunDirectory(run).evaluation(step)


def write_results(directory: Path, results: dict[str, Any], model: str, step: int | None) -> Path:
    """Writes results and samples through lm-eval's tracker; returns the results file.

    Raises:
        UserError: the disk is full or not writable; nothing is left then.
    """
    from lm_eval.loggers import EvaluationTracker

    results = copy.copy(results)
    samples = copy.deepcopy(results.pop("samples"))
    results["evaluation"] = {**results["evaluation"], "step": step}
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f".{uuid.uuid4().hex[:12]}.partial"
    try:
        aside.mkdir()
        tracker = EvaluationTracker(output_path=str(aside / "results.json"))
        tracker.general_config_tracker.log_experiment_args(
            model_source="bov", model_args={"pretrained": model}, system_instruction=None,
            chat_template=None, fewshot_as_multiturn=False,
        )  # fmt: skip
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, rows in samples.items():
            if rows:
                tracker.save_results_samples(task_name=task, samples=rows)
        return _publish(aside, directory, {t: len(rows) for t, rows in samples.items() if rows})
    except OSError as error:
        raise file_error(error, directory) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _publish(aside: Path, directory: Path, expected: dict[str, int]) -> Path:
    """Moves the files to their place, the results last; the tracker hides its own failures."""
    found = sorted(aside.glob("results_*.json"))
    samples = sorted(aside.glob("samples_*.jsonl"))
    n_line = sum(path.read_bytes().count(b"\n") for path in samples)
    if len(found) != 1 or n_line != sum(expected.values()):
        raise StorageError(f"{directory}: the results could not be written (is the disk full?)")
    for path in (*samples, found[0]):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        path.replace(directory / path.name)
    return directory / found[0].name


def read_results(directory: Path) -> list[dict[str, Any]]:
    """All complete results in a directory, oldest first; unreadable ones are a `UserError`."""
    found = []
    for path in sorted(directory.glob("results_*.json")):
        try:
            found.append({**json.loads(path.read_text(encoding="utf-8")), "path": str(path)})
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    return found


def is_done(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether an evaluation with these settings lies there."""
    return any(
        results.get("evaluation", {}).get("settings") == settings
        for results in read_results(directory)
    )


def remove_orphans(directory: Path) -> None:
    """Removes samples whose results were never written, and what killed writers left.

    Only for who holds the claim on that directory.
    """
    dates = {p.name.removeprefix("results_").removesuffix(".json")
             for p in directory.glob("results_*.json")}  # fmt: skip
    for path in directory.glob("samples_*.jsonl"):
        date = re.search(r"_(\d{4}-\d{2}-\d{2}T.*)\.jsonl$", path.name)
        if date and date[1] not in dates:
            path.unlink(missing_ok=True)
    for path in directory.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _claim_of(run: Path, step: int, settings: dict[str, Any]) -> tuple[Path, str]:
    """Directory and name of a claim: the same for all who would evaluate a step in the same way."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return run / EVAL / "claims", f"{step_name(step)}-{digest[:12]}"


def claim_step(
    run: Path, step: int, settings: dict[str, Any], stale_after_s: float = claims.STALE_AFTER_S
) -> claims.Claim | None:
    """The right to evaluate a step in that way; None where somebody has it, or has used it."""
    directory = step_directory(run, step)
    if is_done(directory, settings):
        return None
    claim = claims.take(*_claim_of(run, step, settings), stale_after_s)
    # Between the look and the claim, somebody else may have finished.
    if claim is not None and is_done(directory, settings):
        with claim:
            return None
    if claim is not None:
        remove_orphans(directory)
    return claim


def publish(run: Path, step: int, results: dict[str, Any], model: str) -> None:
    """Writes the results of a step, and the run's summary anew."""
    write_results(step_directory(run, step), results, model, step)
    write_summary(run)


def metrics(results: dict[str, Any]) -> dict[str, float]:
    """What loggers get: group aggregates and every task's accuracy, or its first metric.

    Names: ``eval/core_paper``, ``eval/core_arc_easy``.
    """
    logged: dict[str, float] = {}
    for name, values in results["results"].items():
        numbers = {
            key.partition(",")[0]: value
            for key, value in values.items()
            if isinstance(value, float | int) and "," in key and "_stderr" not in key
        }
        if numbers:
            preferred = next((m for m in ("acc", "centered") if m in numbers), next(iter(numbers)))
            logged[f"eval/{name}"] = float(numbers[preferred])
    return logged


def write_summary(run: Path) -> None:
    """Makes RUN/eval/metrics.csv from all results of the run."""
    rows: dict[int, dict[str, float]] = {}
    for directory in sorted((run / EVAL).glob("step-*")):
        for results in read_results(directory):
            step = step_of(directory)
            rows.setdefault(step, {}).update(metrics(results))
    columns = ["step", *dict.fromkeys(key for row in rows.values() for key in row)]

    def write(file) -> None:
        import io

        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows({"step": step, **row} for step, row in sorted(rows.items()))
        text.flush()
        text.detach()

    write_file(run / EVAL / "metrics.csv", write)
