"""Which checkpoint is the last one: the same for what resumes, deletes, evaluates and exports."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bov_lightning.checkpoint.directory import (
    MARKER,
    complete_checkpoints,
    file_facts,
    find_checkpoint,
    flaw,
    good_checkpoints,
    prune,
    step_directories,
    step_name,
    step_of,
    write_marker,
)
from bov_lightning.errors import UserError

STATES = ("good", "flipped", "truncated", "unmarked")


def write(run: Path, step: int, state: str = "good") -> Path:
    folder = run / "checkpoints" / step_name(step)
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"weights" * 10)
    write_marker(folder, step, file_facts(folder, ["data"]))
    if state == "flipped":
        (folder / "data").write_bytes(b"weighty" * 10)
    if state == "truncated":
        (folder / "data").write_bytes(b"weights")
    if state == "unmarked":
        (folder / MARKER).unlink()
    return folder


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(1, 30), st.sampled_from(STATES), max_size=8),
    st.integers(1, 30), st.integers(1, 4), st.none() | st.integers(1, 6),
)  # fmt: skip
def test_pruning_keeps_the_newest_good_ones(states, written, keep_last, keep_every):
    states = states | {written: "good"}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        for step, state in states.items():
            write(run, step, state)
        before = [step_of(path) for path in good_checkpoints(run)]
        assert before == sorted((s for s, x in states.items() if x == "good"), reverse=True)
        prune(run, keep_last, keep_every, written)
        after = [step_of(path) for path in good_checkpoints(run)]
        kept = {s for s in before if keep_every and s % keep_every == 0}
        assert {*before[:keep_last], written} <= set(after)
        least = min([*before[:keep_last], written])
        assert set(after) == {s for s in before if s >= least} | kept
        # What is no checkpoint any more is nobody's to delete.
        unmarked = {s for s, x in states.items() if x in ("unmarked", "truncated")}
        assert unmarked <= {step_of(path) for path in step_directories(run)}
        assert step_of(find_checkpoint(run)) == after[0]
        assert not [x for x in (run / "checkpoints").iterdir() if x.name.startswith(".")]


def test_what_changed_since_is_looked_at_again(tmp_path):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    assert find_checkpoint(tmp_path) == newer
    (newer / "data").write_bytes(b"weighty" * 10)
    assert "is damaged" in flaw(newer)
    assert find_checkpoint(tmp_path) == older
    with pytest.raises(UserError, match="is damaged"):
        find_checkpoint(newer)


def test_other_names(tmp_path, capsys):
    """A copy may be called anything, but not as if it were of another step."""
    folder = write(tmp_path, 1)
    shutil.copytree(folder, folder.with_name("step-00000001-backup"))
    assert complete_checkpoints(tmp_path) == [folder]
    assert find_checkpoint(folder.with_name("step-00000001-backup"))
    folder.rename(folder.with_name(step_name(5)))
    with pytest.raises(UserError, match="it holds step 1: it was renamed"):
        find_checkpoint(tmp_path)
