"""benchmarks/gpu: all of it at toy size, and what becomes of a stage that fails or hangs."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from types import ModuleType

import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

GPU = REPOSITORY / "benchmarks" / "gpu"
NEEDS_A_GPU = ("MFU", "peak memory")
"""Lines of the table that a CPU has no number for."""


@pytest.fixture(scope="module")
def run() -> ModuleType:
    """The module benchmarks/gpu/run.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(GPU))
        import run

        yield run


def run_sh(*words: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(
        [str(GPU / "run.sh"), *words], env=variables, capture_output=True, text=True
    )


@pytest.mark.slow
def test_dry_run_measures_everything(tmp_path):
    """Every stage, on the CPU; what a GPU alone can tell is missing, and nothing else."""
    done = run_sh("--dry-run", "--output", str(tmp_path), "--minutes", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "table.txt", "results.json", "logs.tar.gz"
    }  # fmt: skip
    text = (tmp_path / "table.txt").read_text()
    assert done.stdout.endswith(f"\n\n{text}")
    lines = text.splitlines()
    assert 25 <= len(lines) <= 36
    unknown = [line for line in lines if line.rstrip().endswith((" -", " ok"))]
    assert not [line for line in unknown if not any(x in line for x in NEEDS_A_GPU)]

    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == [
        "environment", "tests", "journey", "training", "decoding", "save", "fp8", "ladder"
    ]  # fmt: skip
    statuses = {name: found["status"] for name, found in results.items()}
    assert all(status.startswith(("ok", "left out")) for status in statuses.values()), statuses
    journey = results["journey"]["found"]
    assert set(journey["done"].values()) == {True}
    # Twice the same, here: both runs are on the CPU.
    assert journey["loss_difference"] < 1e-4
    assert len(set(journey["losses"]["gpu"])) == 10
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        names = archive.getnames()
    assert {f"{letter}-{name}.log" for letter, name in zip("abcdefgh", results, strict=True)} <= {
        *names
    }


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True).map(sorted),
    st.floats(1, 1000),
    st.floats(0, 1),
)
def test_time_is_shared_out(run, stages, seconds, used):
    """Of what is left: never less than a stage's share of the whole, and never more than is left.

    ``used``: the part of its limit that each stage takes.
    """
    whole, left = sum(run.STAGES[letter].share for letter in stages), seconds
    for i, letter in enumerate(stages):
        limit = run.limits(stages[i:], left)
        assert seconds * run.STAGES[letter].share / whole <= limit * (1 + 1e-9)
        assert limit <= left * (1 + 1e-9)
        left -= used * limit
    assert left + used * limit == pytest.approx(limit), "the last may take all that is left"


def test_a_stage_out_of_time_keeps_what_it_has_found(run, tmp_path):
    """It ends with what it has started: the fixture of all tests looks for processes left over."""
    result = tmp_path / "x.json"
    result.write_text('{"half": 1}')
    words = ["bash", "-c", "sleep 1000 & sleep 1000"]
    found = run.run_stage(words, tmp_path / "x.log", result, 0.2, dict(os.environ))
    assert (found.status, found.found) == ("out of time (0 s)", {"half": 1})
    found = run.run_stage(["false"], tmp_path / "x.log", tmp_path / "y", 60, dict(os.environ))
    assert (found.status, found.found) == ("failed (exit code 1)", {})


@pytest.mark.slow
def test_wheels_are_unpacked_once(run, tmp_path, monkeypatch):
    """Without a network, beside the packages that are there; other wheels replace them."""
    wheels, site = tmp_path / "wheels", tmp_path / "build" / "site"
    monkeypatch.setattr(run, "WHEELS", wheels)
    monkeypatch.setattr(run, "SITE", site)
    run.install_wheels(tmp_path / "log")
    assert not site.exists()
    wheels.mkdir()

    def add_wheel(name: str) -> None:
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as file:
            info = f"{name}-1.0.dist-info"
            file.writestr(f"{name}.py", "")
            file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
                          "Requires-Dist: nowhere\n")  # fmt: skip
            file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                          "Tag: py3-none-any\n")  # fmt: skip
            file.writestr(f"{info}/RECORD", "")

    add_wheel("first_of_them")
    run.install_wheels(tmp_path / "log")
    (site / "mark").touch()
    run.install_wheels(tmp_path / "log")
    assert {"first_of_them.py", "mark"} <= {path.name for path in site.iterdir()}
    add_wheel("second_of_them")
    run.install_wheels(tmp_path / "log")
    found = {path.name for path in site.iterdir()}
    assert {"first_of_them.py", "second_of_them.py"} <= found
    assert "mark" not in found


def test_table_has_numbers_beside_what_is_wanted(run):
    from table import Row, at_least, at_most, table

    rows = [
        Row("a", "small enough", "x:y", "{:.1f}", **at_most(1)),
        Row("a", "too small", "x:y", "{:.1f}", **at_least(1)),
        Row("a", "without a number", "x:z"),
        Row("b", "not measured", "n"),
        Row("c", "not asked for", "n"),
    ]
    outcomes = {"a": run.Outcome("ok", found={"x": {"y": 0.5, "z": float("nan")}}),
                "b": run.Outcome("out of time (9 s)")}  # fmt: skip
    lines = table({"a": "one", "b": "two"}, outcomes, rows).splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["met", "MISSED", "-"]
    assert lines[4].endswith("out of time (9 s)")
    assert lines[5:] == ["b two: out of time (9 s); see logs.tar.gz"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--stages", "d", "x"), "--stages x: there are a environment, b tests"),
        (("--minutes", "0"), "--minutes 0.0: must be above 0"),
        (("--text", "/nowhere"), "--text /nowhere: no files train-* lie there"),
    ],
)
def test_mistakes_are_one_line(run, capsys, words, line):
    with pytest.raises(SystemExit) as stopped:
        run.read_options(list(words))
    assert stopped.value.code == 2
    assert line in capsys.readouterr().err
