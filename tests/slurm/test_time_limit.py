"""A run on a real SLURM of two nodes, whose time is over."""

import contextlib
import math
import os
import signal

import pytest
from slurm.job import Job, has_signal

pytestmark = pytest.mark.slurm


def test_a_time_limit_stops_and_requeues(cluster, long_recipe, monkeypatch, capsys):
    """SLURM itself sends the signal, up to half a minute early.

    The limit is shortened once there is something to lose, however long that took.
    """
    options = ("--time", "0:50:00", "--save-before-s", "60", "--run.name", "limited")
    job = Job(cluster, long_recipe, monkeypatch, capsys, *options)
    job.wait_for_progress()
    # Nothing is gained by training until the signal comes.
    tasks = job.tasks()
    for pid in tasks:
        os.kill(pid, signal.SIGSTOP)
    job.limit_to(1 + math.ceil(job.seconds() / 60))
    told = lambda: all(has_signal(pid, "ShdPnd") for pid in tasks)  # noqa: E731
    job.wait_until(lambda: told() or job.n_requeue(), "SIGUSR1")
    for pid in tasks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    job.wait_until(job.n_requeue, "a requeue")
    job.limit_to(50)
    job.wait_for_attempt(1)
    assert job.resumed() == job.stopped()
    assert job.n_requeue() == 1
    job.wait_for_end()
