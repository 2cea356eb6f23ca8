"""What is written in the background, and what happens to its directory meanwhile."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

import bov_lightning
from bov_lightning.checkpoint.directory import complete_checkpoints
from bov_lightning.checkpoint.reading import read_tensors
from bov_lightning.checkpoint.writing import CheckpointWriter
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.errors import UserError


class Buffers:
    """Copies as the stager does that keeps its buffers, but not into pinned memory."""

    def __init__(self, broken: int = 0):
        self.kept, self.n_made, self.broken = None, 0, broken

    def stage(self, state):
        if self.broken:
            self.broken -= 1
            raise RuntimeError("no memory to pin")
        if self.kept is None:
            self.n_made += 1
            self.kept = {
                part: {name: torch.empty_like(t) for name, t in tensors.items()}
                for part, tensors in state.items()
            }
        for part, tensors in state.items():
            for name, tensor in tensors.items():
                self.kept[part][name].copy_(tensor)
        return self.kept


@pytest.mark.parametrize("broken", [0, 1])
def test_prepared_buffers_serve_the_first_save(tmp_path, broken):
    """What was copied into them before is gone; where they could not be made, the save does it."""
    writer = CheckpointWriter(tmp_path, "model: {}", Ranks(None))
    writer._stager = Buffers(broken)
    weight, moment = torch.zeros(3, 4), torch.zeros(4)
    tensors = {"weight": weight}, {"weight.moment": moment}
    for _ in range(2):
        writer.prepare(torch.device("cpu"), *tensors)
    writer._preparing.join()
    assert writer._stager.n_made == 1 - broken
    weight.fill_(2.0)
    moment.fill_(3.0)
    writer.start(1, *tensors, {}, lambda: None)
    writer.wait()
    assert writer._stager.n_made == 1
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    found = {"weight": torch.empty(3, 4)}
    read_tensors(checkpoint / "weights", found)
    assert torch.equal(found["weight"], weight)
    assert bov_lightning.checkpoint.directory.problem(checkpoint) is None


class Mover:
    """Moves a directory away when Python is about to touch something in it for the n-th time."""

    def __init__(self):
        self.run: Path | None = None
        sys.addaudithook(self._see)  # for the life of the process

    def _see(self, event: str, arguments: tuple) -> None:
        if self.run is None or event not in ("open", "os.mkdir", "os.rename", "os.remove"):
            return
        if not str(arguments[0]).startswith(f"{self.run}/"):
            return
        self.left -= 1
        if self.left == 0:
            run, self.run = self.run, None
            run.rename(run.with_name("elsewhere"))

    def move(self, run: Path, at: int) -> None:
        self.left, self.run = at, run

    def has_moved(self) -> bool:
        run, self.run = self.run, None
        return run is None


@pytest.fixture(scope="module")
def mover():
    return Mover()


def test_a_run_that_is_moved_while_it_is_written_stays_away(tmp_path, mover):
    """Whenever it happens: nothing is made anew in its place, and the next save works."""
    tensors = {"weight": torch.ones(3, 4)}, {"weight.moment": torch.ones(4)}
    for at in itertools.count(1):
        run = tmp_path / str(at) / "run"
        (run / "code").mkdir(parents=True)
        (run / "code" / "own.py").write_text("")

        def check(run=run):
            if not run.exists():
                raise UserError("it was moved")

        writer = CheckpointWriter(run, "model: {}", Ranks(None), check)
        mover.move(run, at)
        writer.start(1, *tensors, {}, lambda: None)
        writer._thread.join()
        if not mover.has_moved():
            break
        with pytest.raises(UserError, match="^it was moved$"):
            writer.wait()
        assert not run.exists()
        (tmp_path / str(at) / "elsewhere").rename(run)
        writer.start(2, *tensors, {}, lambda: None)
        writer.wait()
        assert complete_checkpoints(run)[-1].name == "step-00000002"
        assert not list(run.rglob("*.partial"))
    assert at > 10
    writer.wait()
