"""A run on a real SLURM of two nodes, told to stop again and again."""

import pytest
from slurm.job import Job, assert_ends_as_undisturbed, listens

pytestmark = pytest.mark.slurm


def test_five_signals_in_a_row(cluster, long_recipe, workplace, monkeypatch, capsys):
    """No deadlock, and no step lost, also when they come while the processes start."""
    hold = workplace / "hold"
    site = workplace / "site" / "sitecustomize.py"
    site.parent.mkdir()
    site.write_text(f"""\
import os, time
while os.path.exists({str(hold)!r}):
    time.sleep(0.02)
""")
    slow = ("--setup", f'export PYTHONPATH="{site.parent}:$PYTHONPATH"')
    job = Job(cluster, long_recipe, monkeypatch, capsys, *slow)
    for n in (1, 2):
        job.wait_for_progress()
        hold.touch()
        job.tell_and_wait()
        assert len(job.stopped()) == n

        # Before they listen, the signal ends them; there is nothing to lose.
        job.wait_for_tasks(lambda pid: not listens(pid))
        job.tell_and_wait()
        assert len(job.stopped()) == n
        hold.unlink()
        if n == 2:
            # While they import.
            job.wait_for_tasks(listens)
            job.tell_and_wait()
            assert job.resumed()[-1] == job.stopped()[1]
        job.wait_for_attempt(len(job.stopped()))
        assert set(job.resumed()) == set(job.stopped())
    assert job.n_requeue() == 5
    assert_ends_as_undisturbed(job, long_recipe)
