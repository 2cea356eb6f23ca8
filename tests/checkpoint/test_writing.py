"""A save from a GPU copies into buffers that a thread has made before."""

import pytest
import torch

import bov_lightning
from bov_lightning.checkpoint.reading import read_tensors
from bov_lightning.checkpoint.writing import CheckpointWriter
from bov_lightning.distributed.ranks import Ranks


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
