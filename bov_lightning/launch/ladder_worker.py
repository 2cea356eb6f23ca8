"""Trains the runs of a ladder in this process, one after the other.

Imports, data and what was compiled are paid for once. Several such processes share the work by
locks of the run directories: on one device, on several, or on machines with one file system.
"""

import contextlib
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bov_lightning.console import say
from bov_lightning.distributed import preemption
from bov_lightning.distributed.preemption import Preempted
from bov_lightning.errors import DivergedError, UserError
from bov_lightning.launch.ladder import Job, LadderRuns
from bov_lightning.launch.sweep_here import lock_run
from bov_lightning.recipe.given import Given
from bov_lightning.report.ladder_results import Result, add_result, read_results
from bov_lightning.report.reading import read_run
from bov_lightning.run.directory import RunDirectory, git_commit

POLL_S = 0.2
HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def work(runs: LadderRuns, folder: Path, deadline: float) -> list[str]:
    """Trains what has not ended, until nothing is left or the time is up.

    Args:
        runs: the ladder's.
        folder: where runs.csv is.
        deadline: seconds since the epoch at which a run is told to save, and no other one begins.

    Returns:
        The runs that failed.

    Raises:
        Preempted: a signal came, and the run that was training has saved.
    """
    torch.set_num_threads(1)
    jobs, order = runs.wanted_jobs(), [job.name for job in runs.jobs()]
    failed: dict[str, str] = {}
    with _stopped_at(deadline):
        while True:
            if code := preemption.received():
                if time.time() >= deadline:
                    break
                raise Preempted(code)
            ended = read_results(folder)
            left = [job for job in jobs if job.name not in ended and job.name not in failed]
            if not left or time.time() >= deadline:
                break
            found = _take(runs, left, folder, deadline)
            if found is None:
                # Others train what this waits for; or nobody does, since it has failed.
                if not any(_is_taken(runs, job) for job in left):
                    break
                time.sleep(POLL_S)
                continue
            job, rates, lock = found
            try:
                result = train(runs, job, rates)
                add_result(folder, result, order)
                say(f"{job.name}: val_bpb {result.val_bpb:.4f} ({result.seconds:.0f} s)")
            except Preempted:
                say(f"{job.name}: saved")
                if time.time() < deadline:
                    raise
                break
            except (UserError, RuntimeError) as error:
                failed[job.name] = " ".join(str(error).split())
                say(f"{job.name} failed: {failed[job.name]}")
            finally:
                os.close(lock)
    return list(failed)


@contextlib.contextmanager
def _stopped_at(deadline: float) -> Iterator[None]:
    """Signals, and the deadline, have a run save and end at a step boundary."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    preemption.install()
    timer = None
    if math.isfinite(deadline):
        seconds = max(0.0, deadline - time.time())
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _take(
    runs: LadderRuns, left: list[Job], folder: Path, deadline: float
) -> tuple[Job, tuple[float, float], int] | None:
    """The first run that can begin now: itself, its rates, and the lock that holds it."""
    ended = read_results(folder)
    for job in left:
        rates = runs.rates_of(job, list(ended.values()))
        if rates is None or _takes_too_long(job, ended, deadline):
            continue
        path = runs.root / job.name
        if RunDirectory(path).trainer() is not None or (lock := lock_run(path)) is None:
            continue
        if job.name not in read_results(folder):
            return job, rates, lock
        os.close(lock)
    return None


def _takes_too_long(job: Job, ended: dict[str, Result], deadline: float) -> bool:
    """Whether runs of its rung, or of a lower one, took longer than there is time."""
    seconds: dict[str, list[float]] = {}
    for result in ended.values():
        if result.flops <= 1.1 * job.rung.flops:
            seconds.setdefault(result.rung, []).append(result.seconds)
    longest = max(map(statistics.median, seconds.values()), default=0.0)
    return time.time() + longest > deadline


def _is_taken(runs: LadderRuns, job: Job) -> bool:
    """Whether another process holds the run."""
    lock = lock_run(runs.root / job.name)
    if lock is None:
        return True
    os.close(lock)
    return False


def train(runs: LadderRuns, job: Job, rates: tuple[float, float]) -> Result:
    """Trains a run to its end, as `bov fit` does; what it says goes to its sweep.log."""
    from bov_lightning.training.fit import fit

    started = time.time()
    given, diverged = runs.given(job, rates), False
    directory, plan = RunDirectory(given.run), runs.plan_of(job.rung, job.arm)
    directory.path.mkdir(parents=True, exist_ok=True)
    with (
        open(directory.log, "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log), contextlib.redirect_stderr(log),
    ):  # fmt: skip
        try:
            fit(given)
        except DivergedError as error:
            say(str(error))
            diverged = True
        found = read_run(directory.path, job.name)
        diverged = diverged or not math.isfinite(found.val_bpb)
        if not diverged and found.unfinished is not None:
            raise UserError(found.unfinished)
        if given.recipe.compile:
            # torch compiles no code for more than a few networks; what it made lies in its cache.
            torch._dynamo.reset()
        train_bpb = math.nan if diverged else trained_bpb(given, plan["tokens"], runs.precision)
    validated, corpus = given.recipe.validation.tokens, runs.corpus_tokens
    return Result(
        run=job.name, kind=job.kind, rung=job.rung.name, arm=job.arm.name, seed=job.seed,
        rates=rates[0], table_rates=rates[1], val_bpb=math.nan if diverged else found.val_bpb,
        train_bpb=train_bpb, steps=plan["iterations"], tokens=plan["tokens"],
        epochs=plan["tokens"] / corpus if corpus else math.nan, flops=plan["flops"],
        parameters=plan["params"]["live"], tables=plan["params"]["tables"],
        train_seconds=found.train_seconds, seconds=time.time() - started,
        device=runs.device, precision=runs.precision, text=found.data["source"],
        tokenizer=found.data["tokenizer"], val_rows=found.data["val_rows"],
        val_tokens="all" if validated is None else str(validated),
        recipe=runs.fingerprint(given), ladder=runs.ladder.digest, commit=git_commit() or "unknown",
    )  # fmt: skip


@torch.inference_mode()
def trained_bpb(given: Given, n_trained: int, precision: str) -> float:
    """Bits per byte of the run's newest checkpoint on text that it was trained on.

    Args:
        given: its recipe.
        n_trained: tokens that it was trained on.
        precision: trainer.precision.

    Returns:
        Over as many tokens as are validated on, spread evenly over those that were trained on; NaN
        where the data has no global order.
    """
    import bov_lightning
    from bov_lightning.recipe.data_module import build_data
    from data_modules.order import rows_at
    from data_modules.packed import PackedDataModule
    from data_modules.tokenizer import read_tokenizer, token_bytes
    from evaluation.bits_per_byte import BitsPerByte

    data, recipe = build_data(given), given.recipe
    if not isinstance(data, PackedDataModule):
        return math.nan
    manifest = data.corpus.read_manifest()
    rows = data.corpus.open_rows("train", manifest)
    n_byte = torch.from_numpy(token_bytes(read_tokenizer(data.tokenizer_directory)))
    seen = max(1, n_trained // recipe.model.config.sequence_len)
    wanted = recipe.validation.tokens or manifest["shards"]["val"][0]["rows"] * rows.row_len
    n_row = min(seen, -(-wanted // recipe.model.config.sequence_len))
    positions = np.linspace(0, seen - 1, n_row).astype(np.int64)
    cpu = recipe.trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if cpu else "cuda")
    model, _ = bov_lightning.load(given.run, device=device)
    metric, n_byte = BitsPerByte().to(device), n_byte.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bf16")):
        for start in range(0, n_row, recipe.batch.micro):
            at = rows_at(positions[start : start + recipe.batch.micro], len(rows), recipe.seed)
            batch = torch.from_numpy(rows.read(at).astype(np.int64)).to(device)
            targets = batch[:, 1:]
            nats = model(batch[:, :-1], targets, reduction="none")
            metric.update(nats, n_byte[targets])
    return float(metric.compute())
