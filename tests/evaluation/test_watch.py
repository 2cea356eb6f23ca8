"""Watchers beside a run: every checkpoint evaluated once, whoever dies."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from forks import Bov
from runs import wait_for

from bov_lightning import claims
from bov_lightning.checkpoint.directory import complete_checkpoints
from bov_lightning.cli import main
from bov_lightning.errors import UserError
from evaluation.results import is_done, read_results, step_directory
from evaluation.watch import Watcher, last_step

TASKS = ("tiny_choice", "tiny_schema")
SETTINGS = {"tasks": sorted(TASKS), "max_per_task": None, "time_limit": None}


def watch_command(run: Path, tasks_folder: Path) -> list[str]:
    return [
        "evaluate", str(run), "--watch", "--tasks", *TASKS, "--data-dir", str(tasks_folder),
        "--include-path", str(tasks_folder), "--poll-seconds", "0.1",
    ]  # fmt: skip


def assert_every_step_once(run: Path) -> None:
    steps = [int(path.name.removeprefix("step-")) for path in complete_checkpoints(run)]
    assert len(steps) == 4
    for step in steps:
        directory = step_directory(run, step)
        (results,) = read_results(directory)
        assert results["evaluation"]["settings"] == SETTINGS
        for task in TASKS:
            (path,) = directory.glob(f"samples_{task}_*.jsonl")
            assert len([json.loads(line) for line in path.read_text().splitlines()]) == 14
    assert not list((run / "eval").rglob("*.partial"))
    assert not list((run / "eval" / "claims").iterdir())


def claimant(run: Path) -> int | None:
    """The process that has claimed a step."""
    for path in (run / "eval" / "claims").glob("step-*"):
        with contextlib.suppress(FileNotFoundError):
            text = path.read_text()
            if text.endswith("}"):
                return json.loads(text)["pid"]
    return None


def logged_steps(run: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    return [event.step for event in events.Scalars("eval/tiny_choice")]


@pytest.mark.slow
def test_watcher_evaluates_every_checkpoint_and_ends_with_the_run(tiny_run, tasks_folder, capsys):
    assert last_step(tiny_run) == 8
    assert main(watch_command(tiny_run, tasks_folder)) == 0
    assert_every_step_once(tiny_run)
    assert logged_steps(tiny_run) == [2, 4, 6, 8]
    times = {p: p.stat().st_mtime_ns for p in (tiny_run / "eval").rglob("results_*")}
    assert main(watch_command(tiny_run, tasks_folder)) == 0
    assert {p: p.stat().st_mtime_ns for p in times} == times
    capsys.readouterr()


@pytest.mark.slow
def test_watcher_started_before_the_run_follows_it(tiny_recipe, tasks_folder):
    run = Path("runs/tiny")
    with Bov(*watch_command(run, tasks_folder)) as watcher:
        assert main(["fit", "--config", str(tiny_recipe)]) == 0
        assert watcher.wait(120) == 0, watcher.err
    assert_every_step_once(run)


@pytest.mark.slow
def test_two_watchers_one_killed_in_the_middle_of_a_task(tiny_run, tasks_folder):
    command = watch_command(tiny_run, tasks_folder)
    with Bov(*command) as first, Bov(*command) as second:
        owner = wait_for(lambda: claimant(tiny_run), first, second)
        killed, other = (first, second) if owner == first.pid else (second, first)
        assert owner == killed.pid
        killed.kill()
        killed.wait()
        assert other.wait(timeout=120) == 0
    assert_every_step_once(tiny_run)


@pytest.mark.slow
def test_sigterm_ends_a_watcher_and_gives_its_claim_up(tiny_run, tasks_folder):
    with Bov(*watch_command(tiny_run, tasks_folder)) as watcher:
        wait_for(lambda: list(tiny_run.glob("eval/claims/step-*")), watcher)
        watcher.terminate()
        assert watcher.wait(60) in (143, 0), watcher.err  # 0: it had just finished
    assert not list(tiny_run.glob("eval/claims/step-*"))
    assert main(watch_command(tiny_run, tasks_folder)) == 0
    assert_every_step_once(tiny_run)


def make_watcher(run: Path, evaluate, lines: list[str]) -> Watcher:
    return Watcher(run, SETTINGS, evaluate, lines.append, poll_s=0.05)


@pytest.mark.slow
def test_checkpoint_that_vanishes_while_it_is_read(tiny_run, tasks_folder):
    from dataclasses import replace

    from evaluation.command import Command

    lines: list[str] = []
    command = Command({
        "checkpoint": str(tiny_run), "tasks": list(TASKS), "max_per_task": None,
        "data_dir": str(tasks_folder), "include_path": str(tasks_folder), "time_limit": None,
        "tokens_per_forward": 8192, "device": "cpu", "dtype": "float32",
    })  # fmt: skip
    assert replace(command.benchmarks).settings == SETTINGS

    def evaluate(checkpoint: Path) -> dict:
        if checkpoint.name.endswith("4"):
            shutil.rmtree(checkpoint)
        return command._evaluate(str(checkpoint))

    make_watcher(tiny_run, evaluate, lines).watch()
    assert any("step 4: the checkpoint was removed while it was read" in line for line in lines)
    assert [is_done(step_directory(tiny_run, s), SETTINGS) for s in (2, 4, 6, 8)] == [
        True, False, True, True
    ]  # fmt: skip


def test_an_error_of_the_evaluation_is_not_taken_for_a_removed_checkpoint(tiny_run):
    def evaluate(checkpoint: Path) -> dict:
        raise UserError("no such data")

    with pytest.raises(UserError, match="no such data"):
        make_watcher(tiny_run, evaluate, []).watch()
    assert not list((tiny_run / "eval" / "claims").iterdir())


def test_only_one_of_many_gets_a_claim(tmp_path):
    found, barrier = [], threading.Barrier(8)

    def race() -> None:
        barrier.wait()
        found.append(claims.take(tmp_path, "step-1"))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (claim,) = filter(None, found)
    with claim:
        assert claims.take(tmp_path, "step-1") is None
        assert claim.is_mine()
    with claims.take(tmp_path, "step-1"):
        pass
    assert not list(tmp_path.iterdir())


def test_claims_of_the_dead_are_taken_over_once(tmp_path):
    def leave_behind(**changes) -> Path:
        for path in tmp_path.iterdir():
            path.unlink()
        path = tmp_path / "step-1.0"
        path.write_text(json.dumps(claims.identity() | changes))
        return path

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leave_behind(pid=dead.pid)
    with claims.take(tmp_path, "step-1") as claim:
        assert claim.generation == 1
        assert claims.take(tmp_path, "step-1") is None

    # On another machine only the file's age tells.
    path = leave_behind(host="elsewhere")
    assert claims.take(tmp_path, "step-1", stale_after_s=60) is None
    os.utime(path, (time.time() - 61,) * 2)
    stale = claims.take(tmp_path, "step-1", stale_after_s=60)
    with stale:
        # Who was only asleep learns of it, and leaves the new claim alone.
        sleeper = claims.Claim(tmp_path, "step-1", 0, 60)
        assert not sleeper.is_mine()
        with sleeper:
            pass
        assert stale.is_mine()

    leave_behind(started="0")  # the same number, another process
    assert claims.take(tmp_path, "step-1").generation == 1


def test_mistakes(tiny_run, capsys, tasks_folder):
    checkpoint = str(complete_checkpoints(tiny_run)[0])
    for options, message in (
        ([checkpoint, "--watch"], "--watch takes a run directory"),
        ([str(tiny_run), "--watch", "--output", "x"], "leave --compare and --output away"),
    ):
        assert main(["evaluate", *options, "--tasks", "tiny_choice"]) == 2
        assert message in capsys.readouterr().err
    broken = tiny_run / "config.yaml"
    broken.write_text(yaml.safe_dump({"modle": {}}))
    assert main(watch_command(tiny_run, tasks_folder)) == 2
    assert "did you mean model" in capsys.readouterr().err
