"""What is read from runs, and what is said of runs that cannot be read."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_material import VALUES, value_section, write_run
from safetensors.torch import save_file
from variants import make_model, mostly_slow, perturb

from bov_lightning.checkpoint.directory import CONFIG, WEIGHTS, file_facts, write_marker
from bov_lightning.checkpoint.writing import write_checkpoint
from bov_lightning.errors import UserError
from bov_lightning.report import write_report
from bov_lightning.report.reading import read_run, read_runs


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_facts(path: Path, **facts) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


DAMAGE = {
    "no metrics": (lambda run: (run / "metrics.csv").unlink(), "metrics.csv is missing"),
    "empty metrics": (lambda run: (run / "metrics.csv").write_text(""), "metrics.csv is empty"),
    "no rows": (lambda run: (run / "metrics.csv").write_text("step,val_bpb\n"), "has no rows"),
    "no step": (lambda run: (run / "metrics.csv").write_text("a,b\n1,2\n"), "no column step"),
    "binary": (lambda run: (run / "metrics.csv").write_bytes(b"\xff\xfe\0"), "cannot be read"),
    "a null": (lambda run: (run / "metrics.csv").write_bytes(b"step\n1\0\n"), "metrics.csv"),
    "short row": (lambda run: edit(run / "metrics.csv", "2,4.5,102,", "2,"), "line 3 has 4 fields"),
    "a word": (lambda run: edit(run / "metrics.csv", "4.5", "four"), "train_loss is 'four'"),
    "backwards": (lambda run: edit(run / "metrics.csv", "\n3,", "\n1,"), "line 4: its step"),
    "no facts": (lambda run: (run / "run.json").unlink(), "run.json is missing"),
    "half facts": (lambda run: (run / "run.json").write_text('{"data": {'), "run.json is no JSON"),
    "a list": (lambda run: (run / "run.json").write_text("[]"), "no JSON object"),
    "a text": (lambda run: edit_facts(run / "run.json", iterations="4"), "iterations is '4'"),
    "an abyss": (lambda run: edit_facts(run / "run.json", iterations=10**400), "not a count"),
    "a sea": (lambda run: edit(run / "metrics.csv", ",2048,", ",1e300,"), "tokens is no count"),
    "no params": (lambda run: edit_facts(run / "run.json", params=None), "lacks params"),
    "no config": (lambda run: (run / "config.yaml").unlink(), "config.yaml is missing"),
    "half config": (lambda run: edit(run / "config.yaml", "model:", "model: ["), "config.yaml"),
    "other yaml": (lambda run: (run / "config.yaml").write_text("a: 1"), "no resolved recipe"),
    "nothing": (lambda run: [file.unlink() for file in run.iterdir()], "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_runs_are_listed_with_the_reason(tmp_path, kind):
    damage, reason = DAMAGE[kind]
    damage(write_run(tmp_path / "damaged"))
    write_run(tmp_path / "whole", "standard")
    usable, (bad,) = read_runs([tmp_path / "damaged", tmp_path / "whole"])
    assert [run.name for run in usable] == ["whole"]
    assert bad.name == "damaged"
    assert reason in bad.reason
    assert "\n" not in bad.reason
    write_report([tmp_path / "damaged", tmp_path / "whole"], tmp_path / "r.md", "md")
    assert "| damaged | unusable: " in (tmp_path / "r.md").read_text()


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.sampled_from(["config.yaml", "run.json", "metrics.csv"]), st.floats(0, 1), st.binary())
def test_files_cut_anywhere_never_end_the_report(tmp_path, name, share, tail):
    run = tmp_path / "run"
    if not run.exists():
        write_run(run)
    original = (run / name).read_bytes()
    try:
        (run / name).write_bytes(original[: int(share * len(original))] + tail)
        write_report([run], tmp_path / "report.md", "md")
    finally:
        (run / name).write_bytes(original)


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    path = run / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-5])
    found = read_run(run, "run")
    assert found.step == 3
    assert found.notes == ["the last line of metrics.csv is cut off"]
    assert found.unfinished == "unfinished: step 3 of 4; val_bpb 1.4000 at step 3"


def test_results_need_a_finite_number_at_the_last_step(tmp_path):
    assert read_run(write_run(tmp_path / "whole"), "").unfinished is None
    nan = read_run(write_run(tmp_path / "nan", bpb=[2.0, float("nan")]), "")
    assert nan.unfinished == "no usable val_bpb at its last step, 2"


def test_rows_without_tokens_get_those_of_their_step(tmp_path):
    run = write_run(tmp_path / "run")
    edit(run / "metrics.csv", ",2048,", ",,")
    assert read_run(run, "").metrics["tokens"].tolist() == [1024, 2048, 3072, 4096]


def test_folders_of_runs_and_names(tmp_path):
    write_run(tmp_path / "a" / "same")
    write_run(tmp_path / "b" / "same")
    write_run(tmp_path / "b" / "bad\x01<b>\udcff")
    usable, _ = read_runs([tmp_path / "a", tmp_path / "b", tmp_path / "a" / "same"])
    assert [run.name for run in usable] == ["a/same", "bad?<b>\ufffd", "b/same"]
    for wrong in ([], [tmp_path / "gone"], [tmp_path / "a" / "same" / "run.json"]):
        with pytest.raises(UserError):
            read_runs(wrong)


def test_files_from_strangers_run_no_code_and_fill_no_memory(tmp_path):
    names = ("tag", "bomb", "deep")
    runs = {name: write_run(tmp_path / name) for name in names}
    with open(runs["tag"] / CONFIG, "a") as file:
        file.write(f"x: !!python/object/apply:os.mkdir ['{tmp_path / 'hostile'}']\n")
    levels = "\n".join(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}"
                       for i in range(1, 30))  # fmt: skip
    with open(runs["bomb"] / CONFIG, "a") as file:
        file.write(f"a0: &a0 {{k: 1}}\n{levels}\n")
    (runs["deep"] / "run.json").write_text("[" * 100_000)
    usable, bad = read_runs(list(runs.values()))
    assert not usable
    assert [b.name for b in bad] == list(names)
    assert "with its aliases it holds more than 100,000 values" in bad[1].reason
    assert not (tmp_path / "hostile").exists()


def save(run: Path, model, dtype=torch.float32) -> Path:
    checkpoint = run / "checkpoints" / "step-00000004"
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    config = yaml.safe_dump({"model": {"config": {}}})
    write_checkpoint(checkpoint, 4, weights, config)
    return checkpoint


def learned(model) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for layer, block in enumerate(model.blocks):
        for name in ("coefficient", "context_coefficient"):
            value = getattr(block.attention.value, name)
            # One per channel is no point of a plot over layers.
            if value is not None and len(value) == 1:
                found.setdefault(name, {})[layer] = value.item()
    return found


@pytest.mark.parametrize("name", mostly_slow(VALUES, {"bov", "bov_add_context", "standard"}))
def test_coefficients_are_those_of_the_newest_checkpoint(tmp_path, name):
    model = perturb(make_model(value_section(name)), smear=0.1)
    run = write_run(tmp_path / "run", name)
    save(run, model)
    assert read_run(run, "").coefficients == learned(model)


def test_coefficients_in_bf16_and_in_pieces_of_several_ranks(tmp_path):
    model = perturb(make_model(value_section("bov_add_context")), smear=0.1).bfloat16()
    run = write_run(tmp_path / "run")
    checkpoint = save(run, model, torch.bfloat16)
    assert read_run(run, "").coefficients == learned(model)

    weights = model.state_dict()
    (checkpoint / WEIGHTS / "model.safetensors").unlink()
    names = [name for name in weights if name.endswith("coefficient")]
    for rank in range(2):
        # As FSDP2 shards them: one rank has the number, the others nothing of it.
        part = {n: weights[n] if i % 2 == rank else weights[n][:0] for i, n in enumerate(names)}
        save_file(part, checkpoint / WEIGHTS / f"shard-0000{rank + 1}.safetensors")
    files = [str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*.safetensors")]
    write_marker(checkpoint, 4, file_facts(checkpoint, [CONFIG, *files]))
    assert read_run(run, "").coefficients == learned(model)


def test_damaged_weights_and_evaluations_are_a_note(tmp_path):
    run = write_run(tmp_path / "run")
    checkpoint = save(run, make_model(value_section("bov")))
    weights = checkpoint / WEIGHTS / "model.safetensors"
    weights.write_bytes(os.urandom(100) * (weights.stat().st_size // 100))
    write_marker(checkpoint, 4, file_facts(checkpoint, [CONFIG, f"{WEIGHTS}/{weights.name}"]))
    for number, text in enumerate(("{", "[]", '{"results": {"a": 3}}', '{"results": {}}')):
        results = run / "eval" / "step-00000004" / f"results_{number}.json"
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(text)
        found = read_run(run, "")
        assert found.evaluations == []
        assert found.coefficients == {}
        assert [note.partition(":")[0] for note in found.notes] == [
            "evaluations cannot be read", "coefficients cannot be read",
        ]  # fmt: skip
        results.unlink()


def test_metrics_are_those_of_the_file(tmp_path):
    bpb = list(np.random.default_rng(0).normal(2, 0.1, 30))
    found = read_run(write_run(tmp_path / "run", bpb=bpb), "run")
    assert found.metrics["val_bpb"].tolist() == bpb
    assert found.val_bpb == bpb[-1]
    assert found.tokens == 30 * 1024
    assert found.device_hours == 30 * 7.5 * 2 / 3600
