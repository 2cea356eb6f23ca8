"""Real runs, and the commands and the snippet of docs/report.md on them, as written."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from report_material import read_csv

import bov_lightning
from bov_lightning.cli import main
from bov_lightning.recipe.ladder import read_ladder
from bov_lightning.report.ladder_report import Study
from bov_lightning.report.ladder_results import read_results, read_speeds

DOCS = (REPOSITORY / "docs" / "report.md").read_text(encoding="utf-8")


LADDER = REPOSITORY / "docs" / "results" / "ladder"


@pytest.mark.slow
@pytest.mark.skipif(not (LADDER / "runs.csv").is_file(), reason="the ladder was not run")
def test_the_ladder_s_report_is_that_of_its_lines_and_the_readme_quotes_it(workplace):
    """From runs.csv and speed.csv alone."""
    folder = workplace / "ladder"
    shutil.copytree(LADDER, folder)
    assert main(["sweep", "--ladder", str(folder / "ladder.yaml"), "--report"]) == 0
    committed = (LADDER / "report.md").read_text(encoding="utf-8")
    assert (folder / "report.md").read_text(encoding="utf-8") == committed
    study = Study(
        read_ladder(LADDER / "ladder.yaml"), list(read_results(LADDER).values()),
        read_speeds(LADDER),
    )  # fmt: skip
    readme = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert f"**{study.verdict().word}**" in readme
    assert "docs/results/ladder/multiplier.png" in readme
    # Every rung's multipliers, as the report has them.
    rules = study.ladder.verdict
    for control in rules.controls:
        for rung in study.compared(rules.arm, control)[1].rungs:
            assert f"{rung.equal_flops.value:.2f}" in readme


@pytest.mark.slow
def test_documented_commands_on_real_runs(tiny_recipe, capsys):
    fit = ["fit", "--config", str(tiny_recipe), "--evaluation.tasks", "[heldout]"]
    fit += ["--evaluation.max_per_task", "8"]
    for name, options in {
        "quickstart": [],
        "quickstart-standard": ["--config", "values/standard"],
        "quickstart-seed1": ["--seed", "1"],
        "quickstart-standard-seed1": ["--config", "values/standard", "--seed", "1"],
    }.items():
        assert main([*fit, *options, "--run.name", name]) == 0
    capsys.readouterr()
    (commands,) = re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)
    for line in commands.splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["report.html: 2 runs in 2 rows", "report.html: 4 runs in 2 rows"]
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    Path("report.html").unlink()
    exec(snippet, {})
    assert Path("report.html").stat().st_size > 10_000

    # Numbers of the report are those that the runs wrote and that their weights hold.
    ends = {}
    for row in read_csv(Path("report/runs.csv")):
        metrics = read_csv(Path("runs", row["run"], "metrics.csv"))
        ends[row["run"]] = float(metrics[-1]["val_bpb"])
        assert float(row["val_bpb"]) == ends[row["run"]]
        assert float(row["tokens"]) == float(metrics[-1]["tokens"]) == 8 * 256
        hours = float(metrics[-1]["train_seconds"]) / 3600
        assert float(row["device_hours"]) == pytest.approx(hours)
    assert len(ends) == 4
    rows = {row["values"]: row for row in read_csv(Path("report/results.csv"))}
    for value, runs in {
        "bov": ("quickstart", "quickstart-seed1"),
        "standard": ("quickstart-standard", "quickstart-standard-seed1"),
    }.items():
        mean = np.mean([ends[run] for run in runs])
        assert float(rows[value]["val_bpb"]) == pytest.approx(mean, rel=1e-12)
    (point,) = read_csv(Path("report/coefficients.csv"))
    values = [
        bov_lightning.load(f"runs/{run}")[0].blocks[2].attention.value.coefficient.item()
        for run in ("quickstart", "quickstart-seed1")
    ]
    assert (point["series"], float(point["layer"])) == ("bov", 2)
    assert float(point["coefficient"]) == pytest.approx(np.mean(values), rel=1e-12)
    tasks = {row["task"] for row in read_csv(Path("report/benchmarks_by_task.csv"))}
    assert tasks == {"heldout_last_token", "heldout_continuation"}
