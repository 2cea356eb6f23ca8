"""The files that `bov report` writes, and what it refuses."""

import re
import subprocess
import sys

import pytest
from report_material import VALUES, read_csv, write_run

from bov_lightning.cli import main
from bov_lightning.report import write_report
from bov_lightning.report.content import Column, Table, shown, table_csv
from bov_lightning.report.statistics import Estimate

HOSTILE = "<script>alert(1)</script>$\\frac{|`\"'&"


@pytest.fixture
def runs(tmp_path):
    """Two rows of two seeds, one unfinished run, one empty one, one of another tokenizer."""
    folder = tmp_path / "runs"
    for seed in range(2):
        write_run(folder / f"standard{seed}", "standard", seed, [2.0, 1.6, 1.5 + seed / 50])
        write_run(folder / f"bov{seed}", "bov", seed, [2.0, 1.6, 1.4 + seed / 50])
    write_run(folder / "stopped", "bov", 7, [2.0], steps=3)
    write_run(folder / "alien", "bov", data={"source": "x", "tokenizer": "y", "val_rows": "z"})
    (folder / "empty" / "checkpoints").mkdir(parents=True)
    return folder


@pytest.mark.slow
def test_all_formats_hold_the_same_tables_and_plots(runs, tmp_path, capsys):
    out = tmp_path / "out"
    for name in ("html", "md", "csv", "png"):
        where = out / name if name in ("csv", "png") else out / f"report.{name}"
        assert main(["report", str(runs), "--format", name, "--output", str(where)]) == 0
        said = capsys.readouterr().out.strip()
        assert said == (
            f"{where}: 6 runs in 3 rows, 2 groups that cannot be compared, 1 unfinished, 1 unusable"
        )
    files = {path.stem for path in (out / "csv").iterdir()}
    page = (out / "report.html").read_text()
    assert set(re.findall(r'<table id="([^"]+)"|<figure id="([^"]+)"', page)) == {
        ("", name) if (out / "png" / f"{name}.png").exists() else (name, "") for name in files
    }
    for picture in (out / "png").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text()
    assert "| empty | unusable: config.yaml is missing |" in text
    assert text.count("\n### ") == len(re.findall("<table ", page))
    # Files of an earlier report are replaced, others are left alone.
    (out / "csv" / "mine.txt").write_text("kept")
    write_report([runs], out / "csv", "csv")
    assert (out / "csv" / "mine.txt").exists()


@pytest.mark.slow
def test_names_are_text_and_never_markup(tmp_path):
    folder = tmp_path / "runs"
    write_run(folder / HOSTILE.replace("/", "_"), bpb=[2.0, 1.0])
    write_run(folder / "_hidden", {"source": "bank", "layers": [1, 2], "coefficient": 0.5,
                                   "add_context": False, "shared": False})  # fmt: skip
    write_run(folder / "other", trainer={"precision": HOSTILE}, data={"tokenizer": HOSTILE})
    for name in ("html", "md", "png"):
        write_report([folder], tmp_path / ("png" if name == "png" else f"r.{name}"), name)
    page = (tmp_path / "r.html").read_text()
    assert page.count("<script>") == 1
    assert "alert(1)" in page
    assert "\\<script\\>alert" in (tmp_path / "r.md").read_text()
    assert "<script>" not in (tmp_path / "r.md").read_text().replace("\\<script\\>", "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("end", [1e308, -1e308, 1e-320, 0.0, float("inf")])
def test_numbers_that_no_run_has_end_no_report(tmp_path, end):
    write_run(tmp_path / "runs" / "a", bpb=[2.0, end])
    write_run(tmp_path / "runs" / "b", bpb=[end, end], seed=1)
    write_run(tmp_path / "runs" / "c", "standard", bpb=[end, 1.0])
    for name in ("html", "csv"):
        write_report([tmp_path / "runs"], tmp_path / f"out.{name}", name)


def test_cells_are_read_back_from_their_file(tmp_path):
    columns = [Column("a"), Column("b", ".2f", estimates=True), Column("c", ",d")]
    rows = [['x, "y"\n|', Estimate(1 / 3, 0.25, 0.5), 1234567], ["z", None, None]]
    table = Table("t", "T", columns, rows)
    (tmp_path / "t.csv").write_text(table_csv(table))
    first, second = read_csv(tmp_path / "t.csv")
    assert first["a"] == 'x, "y"\n|'
    assert [float(first[k]) for k in ("b", "b_low", "b_high")] == [1 / 3, 0.25, 0.5]
    assert first["c"] == "1234567"
    assert set(second.values()) == {"z", ""}
    assert [shown(c, k) for c, k in zip(rows[0][1:], columns[1:], strict=True)] == [
        "0.33 [0.25, 0.50]", "1,234,567",
    ]  # fmt: skip
    assert shown(None, columns[2]) == shown(float("nan"), columns[1]) == "-"


@pytest.mark.slow
def test_more_rows_than_styles_say_so(tmp_path):
    for i, name in enumerate([*VALUES, *VALUES]):
        write_run(tmp_path / "runs" / f"{name}{i}", name, model_dtype=i // len(VALUES))
    write_report([tmp_path / "runs"], tmp_path / "r.md", "md")
    assert "Every 28 rows the colours and dashes of lines begin again" in (
        (tmp_path / "r.md").read_text()
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "RUN"),
        (["gone"], "gone is no run directory"),
        (["runs/run/run.json"], "is no run directory"),
        (["runs", "--baseline", "bvo"], "did you mean bov?"),
        (["runs", "--format", "pdf"], "--format"),
        (["runs", "--output", "runs"], "is a directory"),
        (["runs", "--output", "file", "--format", "csv"], "is a file"),
    ],
)
def test_mistakes_are_one_line(workplace, capsys, arguments, word):
    write_run(workplace / "runs" / "run")
    (workplace / "file").write_text("kept")
    assert main(["report", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert word in captured.err
    assert (workplace / "file").read_text() == "kept"
    assert not (workplace / "report.html").exists()


def test_a_folder_without_runs_is_listed(workplace):
    (workplace / "nothing").mkdir()
    write_report([workplace / "nothing"], workplace / "r.md", "md")
    assert "| nothing | unusable: the directory is empty |" in (workplace / "r.md").read_text()


@pytest.mark.slow
def test_no_torch_is_imported(tmp_path):
    write_run(tmp_path / "run")
    code = (
        "import sys; from bov_lightning.cli import main; main(sys.argv[1:]);"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-c", code, "report", str(tmp_path / "run")]
    for arguments, heavy in (
        (["--output", str(tmp_path / "r.html")], set()),
        (["--format", "md", "--output", str(tmp_path / "r.md")], {"matplotlib"}),
    ):
        result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
        imported = set(result.stdout.splitlines()[-1].split())
        assert "yaml" in imported
        assert not imported & (heavy | {"torch", "lightning", "transformers", "lm_eval"})
