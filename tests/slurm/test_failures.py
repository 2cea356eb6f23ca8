"""A run on a real SLURM of two nodes, of which parts fail."""

import os
import signal

import pytest
from slurm.job import EVERY, Job, assert_ends_as_undisturbed

pytestmark = pytest.mark.slurm


def test_a_run_survives_tasks_and_nodes_that_die(cluster, long_recipe, monkeypatch, capsys):
    job = Job(cluster, long_recipe, monkeypatch, capsys)

    # One task dies without a word: at most the steps since the last checkpoint are repeated.
    before = job.wait_for_progress()
    os.kill(job.tasks()[0], signal.SIGKILL)
    job.wait_for_attempt(1)
    assert job.stopped() == []
    assert job.resumed()[-1] >= before
    assert job.resumed()[-1] % EVERY == 0

    # A node dies.
    before = job.wait_for_progress()
    cluster.kill_node(2)
    for pid in job.tasks():
        os.kill(pid, signal.SIGKILL)
    cluster.start_node(2)
    job.wait_for_attempt(2)
    assert job.resumed()[-1] >= before
    assert_ends_as_undisturbed(job, long_recipe)
