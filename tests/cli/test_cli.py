"""The command line: one clear line and exit code 2 for mistakes, and nothing heavy too early."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from forks import bov

from bov_lightning.checkpoint.directory import (
    MARKER,
    complete_checkpoints,
    file_facts,
    list_files,
    write_marker,
)
from bov_lightning.cli import main


def refused(capsys, arguments: list[str]) -> str:
    """The one line that the command says when it refuses."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("bov: error: ")]
    assert len(lines) == 1
    return lines[0]


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.config.n_layers", "4"], ["model.config.n_layers", "mean model.config.n_layer?"]),
        (["--trainer.precison", "16"], ["trainer.precison", "mean trainer.precision?"]),
        (["--trainer.max_steps", "4"], ["trainer.max_steps", "model.budget"]),
        (["--data.init_args.directry", "x"], ["data.init_args.directory?"]),
        (["--data.init_args.source.init_args.colum", "x"], ["source.init_args.column?"]),
        (["--data.class_path", "data_modules.Nothing"], ["data_modules.Nothing"]),
        (["--model.config.value.shared", "true", "--model.config.value.source", "context"],
         ["shared", "bank"]),
        (["--model.config.value.layers", "[1, 7]"], ["7", "layers 0 to 2"]),
        (["--model.config.d_model", "33"], ["d_model 33", "n_head"]),
        (["--model.config.n_layer", "many"], ["model.config.n_layer", "many", "int"]),
        (["--model.config.vocab_size", "400"], ["400", "300", "tokenizer"]),
        (["--batch.tokens", "300"], ["300", "256", "384"]),
        (["--model.budget", "{steps: 3, flops: 1}"], ["exactly one"]),
        (["--batch.tokens", str(2**20)], ["training rows", "batch.tokens"]),
        (["--model.config.sequence_len", "64"], ["sequence_len", "directory"]),
        (["--config", "missing.yaml"], ["missing.yaml", "does not exist"]),
        (["--seed"], ["--seed", "value"]),
        (["--run.name", "a/b"], ["run.name"]),
    ],
)  # fmt: skip
def test_wrong_recipes_are_refused_before_anything_is_written(
    tiny_recipe, workplace, capsys, options, words
):
    before = tree(workplace)
    line = refused(capsys, ["fit", "--config", str(tiny_recipe), *options])
    for word in words:
        assert word in line
    assert tree(workplace) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: [", ["wrong.yaml", "cannot be read"]),
        ("- a\n- b\n", ["wrong.yaml", "mapping"]),
        ("model: 3\n", ["wrong.yaml", "model is 3"]),
        ("mdoel: {}\n", ["wrong.yaml", "mdoel", "mean model?"]),
        ("seed: 0\n", ["model.budget"]),
    ],
)
def test_wrong_files_are_named(workplace, capsys, content, words):
    (workplace / "wrong.yaml").write_text(content)
    line = refused(capsys, ["fit", "--config", "wrong.yaml"])
    for word in words:
        assert word in line


def test_empty_and_unreadable_corpora_leave_nothing_behind(tiny_settings, workplace, capsys):
    (workplace / "empty.txt").write_text(" \n")
    (workplace / "bytes.txt").write_bytes(b"\xff\xfe" * 100)
    settings = json.loads(json.dumps(tiny_settings))
    for name, word in (("empty.txt", "empty"), ("bytes.txt", "bytes.txt row 1: invalid UTF-8")):
        settings["data"]["init_args"]["directory"] = "packed"
        settings["data"]["init_args"]["source"]["init_args"]["train"] = [name]
        (workplace / "recipe.yaml").write_text(yaml.safe_dump(settings))
        before = tree(workplace)
        assert word in refused(capsys, ["fit", "--config", "recipe.yaml"])
        assert tree(workplace) == before


def test_another_architecture_is_refused(tiny_run, capsys):
    checkpoint = tiny_run / "checkpoints/step-00000008"
    config = checkpoint / "config.yaml"
    config.write_text(config.read_text().replace("d_model: 32", "d_model: 64"))
    (checkpoint / MARKER).unlink()
    write_marker(checkpoint, 8, file_facts(checkpoint, list_files(checkpoint)))
    for command in (["validate", "runs/tiny"], ["generate", "runs/tiny"]):
        line = refused(capsys, command)
        assert "another architecture" in line


def test_paths_without_a_checkpoint_are_refused(workplace, capsys):
    (workplace / "empty").mkdir()
    for command in ("validate", "generate"):
        assert "no checkpoint" in refused(capsys, [command, "empty"])
        assert "does not exist" in refused(capsys, [command, "nowhere"])


def test_mistyped_commands_and_options(capsys):
    assert "mean validate?" in refused(capsys, ["validte"])
    assert "bov generate" in refused(capsys, ["generate", "x", "--temprature", "2"])
    assert "config" in refused(capsys, ["fit"])


THEIR_SIZES = {
    "n_layer": 2,
    "n_head": 2,
    "n_kv_head": 2,
    "n_embd": 32,
    "vocab_size": 64,
    "sequence_len": 32,
    "window_pattern": "L",
}


class Hostile:
    """Unpickling this would create a file."""

    def __reduce__(self):
        return (open, ("hostile", "w"))


def declare_complete(checkpoint: Path) -> None:
    """Makes the marker fit the files, as anybody can who makes them."""
    (checkpoint / MARKER).unlink()
    write_marker(checkpoint, 2, file_facts(checkpoint, list_files(checkpoint)))


def test_files_from_strangers_run_no_code(tiny_recipe, tiny_run, workplace, capsys):
    checkpoint, *others = complete_checkpoints(tiny_run)
    for path in others:
        shutil.rmtree(path)

    theirs = workplace / "theirs"
    theirs.mkdir()
    torch.save({"lm_head.weight": Hostile()}, theirs / "model_000001.pt")
    (theirs / "meta_000001.json").write_text(json.dumps({"model_config": THEIR_SIZES}))
    line = refused(capsys, ["import", "nanochat", "theirs", "--output", "ours"])
    assert "model_000001.pt cannot be read" in line
    assert not (workplace / "ours").exists()

    config = checkpoint / "config.yaml"
    original = config.read_text()
    config.write_text(original.replace("data_modules.TextFiles", "subprocess.Popen"))
    declare_complete(checkpoint)
    assert "subprocess.Popen" in refused(capsys, ["validate", str(checkpoint)])
    config.write_text(original + "\nextra: !!python/object/apply:os.system ['touch hostile']\n")
    declare_complete(checkpoint)
    refused(capsys, ["validate", str(checkpoint)])
    refused(capsys, ["generate", str(checkpoint)])
    config.write_text(original)

    torch.save({"global_step": Hostile()}, checkpoint / "training.pt")
    declare_complete(checkpoint)
    assert "cannot be read" in refused(capsys, ["fit", "--config", str(tiny_recipe)])
    for weights in (checkpoint / "weights").iterdir():
        torch.save({"head.weight": Hostile()}, weights)
    declare_complete(checkpoint)
    for command in ("fit", "validate", "generate"):
        where = ["--config", str(tiny_recipe)] if command == "fit" else [str(checkpoint)]
        assert "cannot be read" in refused(capsys, [command, *where]), command
    assert not (workplace / "hostile").exists()


def test_unknown_flags_of_the_authors_code_are_named(workplace, capsys):
    theirs = workplace / "theirs"
    theirs.mkdir()
    torch.save({}, theirs / "model_000001.pt")
    command = ["import", "nanochat", "theirs", "--output", "ours"]
    for flags, words in (
        ({"v_from_the_moon": True}, ["v_from_the_moon"]),
        ({"v_from_x0": True, "v_from_v1": True}, ["v_from_x0", "v_from_v1"]),
        ({"detach_init_value": True}, ["detach_init_value"]),
        ({"learn_init_coeffs": True}, ["learn_init_coeffs"]),
    ):
        (theirs / "meta_000001.json").write_text(json.dumps({"model_config": THEIR_SIZES | flags}))
        line = refused(capsys, command)
        for word in words:
            assert word in line
    assert not (workplace / "ours").exists()


@pytest.mark.slow
def test_full_disk_is_one_line_and_leaves_no_half_checkpoint(tiny_recipe, workplace):
    """A real file system of 300 kB, which takes run files but no checkpoint."""
    disk = workplace / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        result = bov("fit", "--config", tiny_recipe, "--run.root", disk)
        assert result.returncode == 74
        assert "Traceback" not in result.stderr
        last = result.stderr.splitlines()[-1]
        assert last.startswith("bov: error:")
        assert "step-00000006 cannot be written" in last
        assert "MB are free" in last
        # Two saves may fail, with a warning; the third ends the run.
        assert result.stderr.count("training goes on") == 2
        assert not list((disk / "tiny").glob("checkpoints/*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_plan_as_json(capsys):
    assert main(["plan", "--config", "bov-135m", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["params"]["live"] == 233_570_333
    assert plan["iterations"] == 3838


@pytest.mark.slow
def test_plan_as_a_table(capsys):
    assert main(["plan", "--config", "bov-135m"]) == 0
    out = capsys.readouterr().out
    for text in ("233,570,333", "100,663,296", "135,266,329", "3,838", "745,537,536"):
        assert text in out


def imported_by(*arguments: str) -> set[str]:
    """Modules that a command has imported when it ends."""
    code = (
        "import sys; from bov_lightning.cli import main; main(sys.argv[1:]);"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip
    return set(result.stderr.splitlines()[-1].split())


@pytest.mark.slow
def test_commands_import_only_what_they_need(trained):
    heavy = {"torch", "lightning", "transformers", "datasets", "jsonargparse", "numpy", "yaml"}
    assert not imported_by("--help") & heavy
    assert not imported_by("fit", "--config", "nothing") & {"lightning", "transformers", "datasets"}
    plan = imported_by("plan", "--config", "quickstart")
    assert "torch" in plan
    assert not plan & {"lightning", "transformers", "datasets", "tensorboard", "tokenizers"}
    # They take as long as all the rest.
    assert not plan & {"torch._dynamo", "torch._inductor", "torch.distributed.tensor"}
    generate = imported_by("generate", str(trained), "--prompt", "def", "--max-new-tokens", "1")
    assert "tokenizers" in generate
    assert not generate & {"torch._dynamo", "transformers.modeling_utils", "lightning", "scipy"}


def test_keys_lists_every_key_with_its_meaning(capsys):
    from bov_lightning.recipe.keys import known_keys
    from bov_lightning.recipe.sections import Recipe

    assert main(["fit", "--keys"]) == 0
    out = capsys.readouterr().out
    for key in known_keys(Recipe):
        if "." in key and not key.startswith(("model.budget", "data", "trainer")):
            assert f"--{key}" in out, key
    assert "sequence_len" in out
    assert "Tokens per training row" in out
