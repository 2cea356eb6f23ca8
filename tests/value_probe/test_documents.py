"""What text `bov probe` reads: something of every file."""

import json
import os
import resource
from pathlib import Path

import pytest

from bov_lightning.value_probe.command import N_OPEN, documents
from data_modules import sources


@pytest.fixture
def few_files():
    """No more may be open than are read by turns, and some to spare."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    now = 1 + max(map(int, os.listdir("/dev/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (now + N_OPEN + 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("n_file", [3, 2 * N_OPEN + 50])
def test_files_take_turns_however_many_there_are(n_file, tmp_path, few_files, monkeypatch):
    """They are looked for once: a folder of thousands would take minutes otherwise."""
    looked_at = []
    real = sources.identity
    monkeypatch.setattr(sources, "identity", lambda name: looked_at.append(name) or real(name))
    for i in range(n_file):
        rows = [json.dumps({"text": f"{i} {turn}"}) for turn in range(1 + i % 3)]
        (tmp_path / f"{i:05}.jsonl").write_text("\n".join(rows))
    found = list(documents([str(tmp_path / "*.jsonl")]))
    expected = [f"{i} {turn}" for i in range(n_file) for turn in range(1 + i % 3)]
    assert sorted(found) == sorted(expected)
    at_once = min(n_file, N_OPEN)
    assert found[:at_once] == [f"{i} 0" for i in range(at_once)]
    assert len(looked_at) == n_file


def test_whole_files_are_closed_before_the_next_is_read(tmp_path):
    for name in "abc":
        Path(tmp_path, f"{name}.txt").write_text(name)
    before = len(os.listdir("/dev/fd"))
    texts = documents([str(tmp_path / "*.txt")])
    assert [next(texts) for _ in "abc"] == ["a", "b", "c"]
    assert len(os.listdir("/dev/fd")) == before
