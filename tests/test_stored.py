"""What the code before the package had folders has stored: read, continued and evaluated today.

Only commands and public names are used here, since these are what must not change. Numbers of the
old code come from another CPU: losses agree within 1e-5, weights within a thousandth of what
the six steps since the checkpoint have changed.
"""

import csv
import json
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from processes import bov_on_ranks
from safetensors.torch import load_file

import bov_lightning
from bov_lightning.cli import main

STORED = REPOSITORY / "tests" / "stored" / "0.1.0"
RUN, SHARDED = Path("runs/stored"), Path("runs/sharded")
PRINTED = json.loads((STORED / "printed.json").read_text())


@pytest.fixture
def stored(workplace) -> Path:
    """The current directory, as the old code left it, without the packed rows."""
    for name in ("text", "export"):
        shutil.copytree(STORED / name, name)
    shutil.copytree(STORED / "run", RUN)
    shutil.copytree(STORED / "sharded", SHARDED)
    return workplace


def bov(*arguments: str | Path) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def in_process(*command: str) -> str:
    """What a Python process prints."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def rows(folder: Path) -> dict[int, dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return bov_lightning.load(path)[0].state_dict()


def ids(tokenizer) -> torch.Tensor:
    lines = Path("text/val.jsonl").read_text().splitlines()
    tokens = [tokenizer.encode(json.loads(line)["text"])[:60] for line in lines[:4]]
    return torch.tensor([row[: min(map(len, tokens))] for row in tokens])


def assert_ends_as(finished: str, run: Path) -> None:
    """The run, continued from step 6, took the steps of the one that the old code finished."""
    expected, found = rows(STORED / finished), rows(run)
    assert list(found) == list(expected) == list(range(1, 13))
    for step, row in expected.items():
        for name in ("train_loss", "val_bpb"):
            assert (row[name] == "") == (found[step][name] == ""), (step, name)
            if row[name]:
                value = pytest.approx(float(row[name]), rel=1e-5)
                assert float(found[step][name]) == value, (step, name)
        assert float(found[step]["lr_factor"]) == pytest.approx(float(row["lr_factor"]))
        assert found[step]["tokens"] == row["tokens"]
    parts = load_file(STORED / finished / "every_fourth_weight.safetensors")
    before, after = weights(run.with_name(f"{run.name}-before")), weights(run)
    assert after.keys() == parts.keys()
    for name, part in parts.items():
        start, end = (tensors[name].flatten()[::4] for tensors in (before, after))
        assert (end - part).norm() <= 1e-3 * (part - start).norm() + 1e-6, name


def keep_start(run: Path) -> None:
    """What it is at its checkpoint, for `assert_ends_as`."""
    shutil.copytree(run, run.with_name(f"{run.name}-before"))


@torch.no_grad()
def test_runs_and_exports_load(stored):
    model, tokenizer = bov_lightning.load(RUN)
    logits = model(ids(tokenizer))
    assert logits.shape[-1] == 120
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1
    for path in (RUN / "checkpoints" / "step-00000006", Path("export")):
        again, theirs = bov_lightning.load(path)
        assert theirs.get_vocab() == tokenizer.get_vocab()
        assert (again(ids(tokenizer)) - logits).abs().max() < 1e-5
    # Two ranks wrote it, one process reads it.
    model, tokenizer = bov_lightning.load(SHARDED)
    assert torch.isfinite(model(ids(tokenizer))).all()


@pytest.mark.slow
def test_validate_prints_what_it_printed(stored, capsys):
    for run, printed in ((RUN, "validate"), (SHARDED, "validate sharded")):
        bov("validate", run, "--trainer.devices", "1")
        found, expected = capsys.readouterr().out.split(), PRINTED[printed].split()
        assert found[-2] == expected[-2] == "val_bpb"
        assert float(found[-1]) == pytest.approx(float(expected[-1]), abs=1.01e-4)


def test_generate_says_what_it_said(stored, capsys):
    for path in (RUN, Path("export")):
        bov("generate", path, "--prompt", "The quick fox", "--temperature", "0",
            "--max-new-tokens", "12")  # fmt: skip
        assert capsys.readouterr().out == PRINTED["generate"]


@pytest.mark.slow
def test_a_run_is_continued_by_its_own_config(stored, capsys):
    keep_start(RUN)
    bov("fit", "--config", RUN / "config.yaml")
    assert "resuming runs/stored from step 6 " in capsys.readouterr().err
    assert_ends_as("finished", RUN)


@pytest.mark.slow
def test_a_job_continues_its_run(stored):
    """By the command line of its sbatch file, which a requeued job repeats after an upgrade."""
    keep_start(RUN)
    for path in (STORED / "job").iterdir():
        text = path.read_text().replace("@ROOT@", str(stored)).replace("@PYTHON@", sys.executable)
        (RUN / path.name).write_text(text)
    lines = (RUN / "submit.sbatch").read_text().splitlines()
    assert f"#SBATCH --chdir={stored}" in lines
    (line,) = (line for line in lines if line.startswith("srun "))
    python, *command = [word for word in shlex.split(line)[1:] if not word.startswith("--k")][1:]
    assert python == sys.executable
    assert command[:3] == ["-m", "bov_lightning.cli", "fit"]
    assert f"resuming {stored}/runs/stored from step 6 " in in_process(*command)
    assert_ends_as("finished", RUN)


@pytest.mark.slow
def test_one_process_continues_what_two_ranks_began(stored, capsys):
    """Its config.yaml names the strategy by the class path that it had."""
    keep_start(SHARDED)
    trainer = yaml.safe_load((SHARDED / "config.yaml").read_text())["trainer"]
    assert trainer["strategy"]["class_path"] == "bov_lightning.strategy.ShardedStrategy"
    bov("fit", "--config", SHARDED / "config.yaml", "--trainer.devices", "1")
    assert "resuming runs/sharded from step 6 " in capsys.readouterr().err
    assert_ends_as("sharded-finished", SHARDED)


@pytest.mark.distributed
def test_two_ranks_continue_what_two_ranks_began(stored):
    keep_start(SHARDED)
    printed = bov_on_ranks(2, "fit", "--config", str(SHARDED / "config.yaml"))
    assert "resuming runs/sharded from step 6 " in printed
    assert_ends_as("sharded-finished", SHARDED)


@pytest.mark.slow
def test_the_guard_remembers(stored):
    """What it has counted lies in training.pt under the name that its class had."""
    checkpoint = RUN / "checkpoints" / "step-00000006"
    path, marker = checkpoint / "training.pt", checkpoint / "checkpoint.json"
    state = torch.load(path, weights_only=True)
    state["callbacks"]["Control"] |= {"n_spike": 3, "n_skipped": 2}
    torch.save(state, path)
    content = json.loads(marker.read_text())
    blob = path.read_bytes()
    content["files"]["training.pt"] = {"bytes": len(blob), "crc32": zlib.crc32(blob)}
    marker.write_text(json.dumps(content))
    bov("fit", "--config", RUN / "config.yaml")
    for step, row in rows(RUN).items():
        counted = ("2", "3") if step > 6 else ("0", "0")
        assert (row["skipped_steps"], row["loss_spikes"]) == counted, step
    (last,) = (RUN / "checkpoints").iterdir()
    kept = torch.load(last / "training.pt", weights_only=True)["callbacks"]["Control"]
    assert kept["n_seen"] == state["callbacks"]["Control"]["n_seen"] + 6
    assert (kept["n_skipped"], kept["n_spike"]) == (2, 3)


@pytest.mark.slow
def test_evaluate_repeats_its_results(stored):
    step = "eval/step-00000006"
    bov("evaluate", RUN, "--tasks", "heldout", "--max-per-task", "6", "--output", "again")
    for kind in ("results_*.json", "samples_heldout_continuation_*.jsonl"):
        (old,), (new,) = (RUN / step).glob(kind), Path("again").glob(kind)
        if kind.startswith("results"):
            expected, found = (json.loads(path.read_text())["results"] for path in (old, new))
            assert found.keys() == expected.keys()
            for task, numbers in expected.items():
                assert found[task] == pytest.approx(numbers, abs=1e-6), task
        else:
            expected, found = (
                [json.loads(line)["doc"] for line in path.read_text().splitlines()]
                for path in (old, new)
            )
            assert found == expected


def as_if_finished(run: Path) -> None:
    shutil.copy(STORED / "finished" / "metrics.csv", run)


@pytest.mark.slow
def test_report_shows_the_run_and_its_evaluation(stored, capsys):
    as_if_finished(RUN)
    bov("report", RUN, "--output", "page.html")
    assert capsys.readouterr().out.strip() == "page.html: 1 run in 1 row"
    page = Path("page.html").read_text()
    assert "stored" in page
    assert f"{float(rows(RUN)[12]['val_bpb']):.4f}" in page
    assert "heldout" in page


@pytest.mark.slow
def test_report_pools_a_run_from_before_the_newest_key(stored, capsys):
    as_if_finished(RUN)
    shutil.copytree(RUN, "runs/older")
    settings = yaml.safe_load((RUN / "config.yaml").read_text())
    del settings["fp8"]
    settings |= {"seed": 1, "run": settings["run"] | {"name": "older"}}
    Path("runs/older/config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    bov("report", RUN, "runs/older", "--output", "page.html")
    assert capsys.readouterr().out.strip() == "page.html: 2 runs in 1 row"


@torch.no_grad()
def test_export_and_import_repeat_themselves(stored):
    bov("export", RUN, "--output", "again")
    bov("import", "hf", "export", "--output", "back")
    expected = load_file("export/model.safetensors")
    found = load_file("again/model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    configs = [json.loads(Path(name, "config.json").read_text()) for name in ("again", "export")]
    for config in configs:
        del config["transformers_version"]  # of whoever wrote it
    assert configs[0]["auto_map"].pop("AutoModel") == "modeling_bov.BoVModel"  # one class more
    assert configs[0].pop("d_mlp") is None  # a key that came later
    later = {"source_args": {}, "gate_channels": 12, "gate_factor": 3.0, "gate_inputs": "x"}
    assert {key: configs[0]["value"].pop(key) for key in later} == later
    assert configs[0] == configs[1]
    model, tokenizer = bov_lightning.load(RUN)
    back, _ = bov_lightning.load("back")
    assert torch.equal(back(ids(tokenizer)), model(ids(tokenizer)))


REGISTERED = """
import bov_lightning.hf
import torch
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("export")
assert type(model).__module__.partition(".")[0] == "bov_lightning", type(model)
assert AutoConfig.from_pretrained("export").model_type == "bov"
with torch.no_grad():
    torch.save(model.eval()(torch.arange(40)[None]).logits, "logits.pt")
"""


@pytest.mark.slow
@torch.no_grad()
def test_importing_hf_is_enough_for_the_auto_classes(stored):
    """In a fresh process, without remote code."""
    in_process("-c", REGISTERED)
    expected = bov_lightning.load(RUN)[0](torch.arange(40)[None])
    assert (torch.load("logits.pt") - expected).abs().max() < 1e-5
