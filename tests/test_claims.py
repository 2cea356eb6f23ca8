"""Claims on what only one process may do, and files that several write at once."""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from bov_lightning import claims
from bov_lightning.files import write_directory, write_file

ELSEWHERE = {"host": "elsewhere", "boot": "x", "pid": 1, "started": "1"}


def leave(folder: Path, **changes) -> Path:
    """A claim of another machine, or of who ``changes`` say."""
    folder.mkdir(exist_ok=True)
    path = folder / "it.0"
    path.write_text(json.dumps(claims.identity() | ELSEWHERE | changes))
    return path


@pytest.mark.slow
def test_one_of_another_machine_that_gives_no_sign_is_taken_over(tmp_path):
    """However the clocks stand: one from the future is only watched."""
    path = leave(tmp_path)
    told = []
    for stamp in (time.time(), time.time() + 10_000):
        os.utime(path, (stamp, stamp))
        with claims.wait_and_take(
            tmp_path, "it", stale_after_s=0.3, poll_s=0.05,
            go_on=lambda owner, is_certain: told.append(is_certain) or True,
        ) as claim:  # fmt: skip
            assert claim.generation == 1
            assert claim.is_mine()
        path = leave(tmp_path)
    assert told
    assert True not in told


def test_one_of_another_machine_that_gives_signs_is_let_alone(tmp_path):
    path, seen = leave(tmp_path), []
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        found = claims.wait_and_take(
            tmp_path, "it", stale_after_s=600, poll_s=0.05,
            go_on=lambda owner, is_certain: seen.append(owner) or not is_certain,
        )  # fmt: skip
    finally:
        ended.set()
        thread.join()
    assert found is None
    assert seen[-1]["host"] == "elsewhere"
    assert "process 1 on elsewhere" in claims.describe(seen[-1])


def test_an_earlier_attempt_of_the_same_job_is_dead(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    leave(tmp_path, job="78", attempt="1")
    assert claims.take(tmp_path, "it") is None
    leave(tmp_path, job="77", attempt="2")
    assert claims.take(tmp_path, "it") is None
    leave(tmp_path, job="77", attempt="1")
    assert claims.take(tmp_path, "it") is not None


def test_a_directory_that_was_made_anew_is_not_mine(tmp_path):
    with claims.take(tmp_path / "a", "it") as claim:
        (tmp_path / "a").rename(tmp_path / "b")
        assert not claim.is_mine()
        with claims.take(tmp_path / "a", "it") as other:
            assert other.is_mine()
            assert not claim.is_mine()
        (tmp_path / "a").rmdir()
        (tmp_path / "b").rename(tmp_path / "a")
        assert claim.is_mine()
    assert not list((tmp_path / "a").iterdir())


def test_without_hard_links(tmp_path, monkeypatch):
    def link(*arguments) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with claims.take(tmp_path, "it") as claim:
        assert claim.is_mine()
        assert claims.take(tmp_path, "it") is None
    assert not list(tmp_path.iterdir())


def write_often(folder: Path, mark: int) -> None:
    for n in range(40):
        write_file(folder / "file", f"{mark} {n}\n" * 100)

        def fill(aside: Path) -> None:
            for name in "ab":
                (aside / name).write_text(f"{mark} {n}")  # noqa: B023

        write_directory(folder / "directory", fill)


@pytest.mark.slow
def test_several_writers_of_one_file_end_well(tmp_path):
    """What is there in the end is whole, of one of them, and the only thing that is there."""
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write_often, args=(tmp_path, mark)) for mark in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(set((tmp_path / "file").read_text().splitlines())) == 1
    assert len({path.read_text() for path in (tmp_path / "directory").iterdir()}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead = multiprocessing.get_context("spawn").Process(target=int)
    dead.start()
    dead.join()
    host = claims.identity()["host"]
    old, new = (tmp_path / f".file.{host}-{pid}-a.partial" for pid in (dead.pid, 1))
    for path in (old, new):
        path.write_text("half")
    write_file(tmp_path / "file", "whole")
    assert not old.exists()
    assert new.exists()
