"""Freed memory is used again without asking the system for it."""

import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource
import torch
from bov_lightning.training.allocator import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        tensors = [torch.ones(2**22) for _ in range(20)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
page_faults()
print(page_faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator alone can be told")
@pytest.mark.slow
def test_tensors_of_a_step_lie_where_those_of_the_last_step_lay():
    command = [sys.executable, "-c", COUNT_FAULTS]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(found) < 1000  # of 240,000 where all pages are new ones
