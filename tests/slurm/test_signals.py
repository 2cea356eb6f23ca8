"""A run on a real SLURM of two nodes, told to stop in every way that clusters know."""

import pytest
from slurm.job import Job, assert_ends_as_undisturbed

pytestmark = pytest.mark.slurm


def test_a_run_survives_the_signals_of_a_cluster(cluster, long_recipe, monkeypatch, capsys):
    """Each comes when there is something to lose; nothing is lost.

    What comes before a time limit is in test_time_limit.py and test_signals_in_a_row.py.
    """
    cancelled = Job(cluster, long_recipe, monkeypatch, capsys)
    cancelled.wait_for_progress()
    cancelled.wait_for_end()
    (stopped,) = cancelled.stopped()
    assert cancelled.newest() == stopped

    # Submitted again, it goes on.
    job = Job(cluster, long_recipe, monkeypatch, capsys)
    job.wait_for_attempt(1)
    assert job.run == cancelled.run
    assert job.resumed() == [stopped]

    # Somebody else's requeue: SLURM sends TERM.
    job.wait_for_progress()
    cluster.run("scontrol", "requeue", job.id)
    job.wait_for_attempt(2)
    assert job.resumed() == [stopped, *job.stopped()]

    # A job of a partition with more rights takes both nodes for a moment.
    job.wait_for_progress()
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "urgent", "-N", "2", "--exclusive", "-o", "/dev/null",
        "--wrap", "sleep 1",
    ).strip()  # fmt: skip
    job.wait_for_attempt(3)
    assert cluster.state(urgent) == "COMPLETED"
    assert job.resumed() == [stopped, *job.stopped()]
    assert_ends_as_undisturbed(job, long_recipe)
