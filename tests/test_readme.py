"""Every command and snippet in README.md and CONTRIBUTING.md runs."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import REPOSITORY

from bov_lightning.cli import main
from bov_lightning.recipe import Recipe, build, check_keys

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
EVALUATION = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
DATA = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
CLUSTERS = (REPOSITORY / "docs" / "clusters.md").read_text(encoding="utf-8")
MEMORY = (REPOSITORY / "docs" / "memory.md").read_text(encoding="utf-8")
INFERENCE = (REPOSITORY / "docs" / "inference.md").read_text(encoding="utf-8")
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    lines = "\n".join(blocks(text, "bash")).splitlines()
    return [line.split("#")[0].strip() for line in lines]


def test_make_targets_in_the_texts_exist():
    targets = {line for text in (README, CONTRIBUTING) for line in commands(text) if "make" in line}
    assert {"make quickstart", "make test"} <= targets
    names = sorted(target.removeprefix("make ") for target in targets)
    subprocess.run(["make", "--dry-run", *names], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.mark.slow
def test_readme_commands_run(workplace, capsys):
    """As written, in order, in an empty directory; training is cut to two steps."""
    (workplace / "recipes").symlink_to(REPOSITORY / "recipes")
    lines = [line for line in commands(README) if line.startswith("bov ")]
    assert len(lines) >= 5
    for line in lines:
        arguments = shlex.split(line)[1:]
        if arguments[0] == "fit":
            arguments += ["--model.budget.steps", "2", "--validation.tokens", "2048"]
        if "--trainer.devices" in arguments:
            # Twice: it starts, and it resumes. Several processes repeat the command line.
            command = [sys.executable, "-m", "bov_lightning.cli", *arguments]
            for steps in ("2", "3"):
                again = [*command, "--model.budget.steps", steps]
                result = subprocess.run(again, capture_output=True, text=True, check=True)
            assert "resuming runs/two from step 2" in result.stderr
            assert "val_bpb" in result.stdout
        else:
            assert main(arguments) == 0, line
    assert "val_bpb" in capsys.readouterr().out
    assert (workplace / "runs" / "quickstart-standard").is_dir()

    for line in filter(
        None, commands(DATA) + commands(MEMORY) + commands(CLUSTERS) + commands(INFERENCE)
    ):
        # Those of a cluster need one, and GPUs; tests/slurm and tests/test_distributed.py run them.
        if line in commands(CLUSTERS) and "--dry-run" not in line:
            continue
        assert main(shlex.split(line)[1:]) == 0, line

    for snippet in (*blocks(INFERENCE, "python"), *blocks(README, "python")):
        names: dict = {}
        exec(snippet, names)
    assert names["logits"].shape == (*names["token_ids"].shape, 4096)


@pytest.mark.slow
def test_evaluation_commands_run(workplace, shared, capsys):
    """As written, in order; the runs are two steps long and CORE is cut to a task of few rows."""
    (workplace / "eval_bundle").symlink_to(shared / "eval_bundle")
    for overlay in ([], ["--config", "values/standard"]):
        arguments = ["fit", "--config", "quickstart", *overlay, "--model.budget.steps", "2"]
        assert main([*arguments, "--validation.tokens", "2048"]) == 0
    for line in commands(EVALUATION):
        cut = ["--tasks", "core_copa", "--max-per-task", "20"] if "--data-dir" in line else []
        assert main([*shlex.split(line)[1:], *cut]) == 0, line
    assert "minus runs/quickstart-standard, paired by row" in capsys.readouterr().out


def test_command_table_names_the_commands_that_exist(capsys):
    from bov_lightning.cli import COMMANDS

    assert set(re.findall(r"^\| `bov (\w+)", README, re.MULTILINE)) == set(COMMANDS)
    assert main(["--help"]) == 0
    assert set(re.findall(r"^  (\w+)  ", capsys.readouterr().out, re.MULTILINE)) == set(COMMANDS)


def test_yaml_snippets_are_valid():
    for text in blocks(README, "yaml") + blocks(EVALUATION, "yaml"):
        data = yaml.safe_load(text)
        check_keys(data, "README.md")
        build(Recipe, data, "README.md")


def test_data_snippets_name_classes_and_arguments_that_exist():
    from bov_lightning.training import _check_class

    snippets = [yaml.safe_load(text) for text in blocks(DATA, "yaml")]
    assert len(snippets) >= 4
    for snippet in snippets:
        _check_class(snippet.get("data") or snippet["source"], "data", "docs/data.md")


def test_links_to_files_exist():
    for folder, text in ((".", README), (".", CONTRIBUTING), ("docs", CLUSTERS)):
        for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
            assert (REPOSITORY / folder / target).exists(), target


@pytest.mark.slow
def test_worked_example_of_a_value_source(tmp_path):
    """CONTRIBUTING's class and YAML, in a process of their own, train and stay causal."""
    (source,) = blocks(CONTRIBUTING, "python")
    (overlay,) = blocks(CONTRIBUTING, "yaml")
    program = f'''
import torch, yaml
import torch.nn.functional as F
from bov_lightning import Transformer, TransformerConfig, ValueConfig
from bov_lightning.model.layers import rms_norm
from bov_lightning.model.values import ValueSource

{source}
value = ValueConfig(**yaml.safe_load("""{overlay}""")["model"]["config"]["value"])
shape = dict(n_layer=3, n_head=2, n_kv_head=2, d_model=32, vocab_size=64)
model = Transformer(TransformerConfig(**shape, value=value))
for block in model.blocks:
    torch.nn.init.normal_(block.attention.output.weight, std=0.1)
torch.nn.init.normal_(model.head.weight, std=0.1)
ids = torch.arange(20)[None]
model(ids[:, :-1], ids[:, 1:]).backward()
assert all(p.grad is not None for p in model.parameters())
changed = ids.clone()
changed[0, 10] = 63
assert torch.equal(model(ids)[:, :10], model(changed)[:, :10])
with torch.no_grad():
    cache = model.new_cache(1, 20)
    pieces = [model(piece, cache=cache) for piece in ids.split((7, 1, 12), dim=1)]
    assert torch.allclose(torch.cat(pieces, 1), model(ids), atol=1e-5)
standard = Transformer(TransformerConfig(**shape))
assert model.flops_per_token() == standard.flops_per_token()
'''
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_version_of_torch_is_pinned():
    assert re.search(r"^torch==", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    pinned = re.search(r"^torch==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert torch.__version__.startswith(pinned[1])
