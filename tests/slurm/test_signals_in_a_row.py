"""A run on a real SLURM of two nodes, told to stop again and again."""

import pytest
from slurm.job import Job, assert_ends_as_undisturbed, listens

pytestmark = pytest.mark.slurm


def test_five_signals_in_a_row(cluster, long_recipe, workplace, monkeypatch, capsys):
    """No deadlock, and no step lost, also when they come while the processes start.

    It is cancelled before, and submitted again.
    """
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
    job.wait_for_progress()
    job.wait_for_end()
    (stopped,) = job.stopped()
    assert job.newest() == stopped

    again = Job(cluster, long_recipe, monkeypatch, capsys, *slow)
    again.wait_for_attempt(1)
    assert again.resumed() == [stopped]
    assert again.run == job.run
    for n in (1, 2):
        again.wait_for_progress()
        hold.touch()
        again.tell_and_wait()
        assert len(again.stopped()) == n

        # Before they listen, the signal ends them; there is nothing to lose.
        again.wait_for_tasks(lambda pid: not listens(pid))
        again.tell_and_wait()
        assert len(again.stopped()) == n
        hold.unlink()
        if n == 2:
            # While they import.
            again.wait_for_tasks(listens)
            again.tell_and_wait()
            assert again.resumed()[-1] == again.stopped()[1]
        again.wait_for_attempt(len(again.stopped()) + 1)
        assert set(again.resumed()) == {stopped, *again.stopped()}
    assert again.n_requeue() == 5
    assert_ends_as_undisturbed(again, long_recipe)
