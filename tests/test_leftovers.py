"""A test that runs out of time, or forgets a process, leaves nothing running."""

import subprocess
import sys
import textwrap

import psutil
import pytest
from conftest import REPOSITORY

TESTS = """
import subprocess, sys, time
import pytest

CHILD = (
    "import subprocess, sys; subprocess.Popen("
    "[sys.executable, '-c', 'import time; time.sleep(900)'], start_new_session=True)"
)

def test_one_forgets_a_grandchild_in_a_session_of_its_own():
    subprocess.run([sys.executable, "-c", CHILD], check=True)

@pytest.mark.timeout(1)
def test_two_hangs():
    subprocess.run([sys.executable, "-c", "import time; time.sleep(900)"])

def test_three_finds_nobody():
    import psutil
    assert psutil.Process().children(recursive=True) == []
"""


@pytest.mark.slow
def test_whatever_a_test_starts_ends_with_it(tmp_path):
    (tmp_path / "test_inside.py").write_text(textwrap.dedent(TESTS))
    (tmp_path / "conftest.py").write_text("from leftovers import no_process_left\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\ntimeout_method = signal\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(REPOSITORY / "tests")},
    )  # fmt: skip
    assert "1 failed, 2 passed" in result.stdout, result.stdout
    assert "Timeout" in result.stdout
    assert not [p for p in psutil.process_iter(["cmdline"])
                if "time.sleep(900)" in " ".join(p.info["cmdline"] or ())]  # fmt: skip
