"""A run with a value source of somebody's own: its file, settings and buffers are part of it."""

import hashlib
import json
import shutil
import sys

import pytest
import torch
import yaml
from runs import fit

import bov_lightning
from bov_lightning.checkpoint.directory import find_checkpoint
from bov_lightning.checkpoint.reading import read_weights
from bov_lightning.cli import main
from bov_lightning.interop.hf_export import export
from bov_lightning.interop.hf_import import load_export
from bov_lightning.run import own_code

SOURCE = '''
"""Values by a token's class: a buffer says which, a setting how many there are."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from bov_lightning.kinds import Range
from bov_lightning.model.values import ValueSource


@dataclass(frozen=True)
class ClassArgs:
    """Settings."""

    n_class: Annotated[int, Range(2, 1000)] = 7
    """Classes of tokens."""


class Classes(ValueSource):
    """A row per class, trained at half the rate of tables."""

    args_class = ClassArgs
    optimizer_groups = {"table": ("table", 0.5)}

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Parameter(torch.empty(config.value.args.n_class, config.d_value))
        self.register_buffer("class_of", torch.empty(config.padded_vocab_size, dtype=torch.int64))

    def initialise(self, values, prefix, embedding, fill):
        fill.normal(f"{prefix}.source.table", self.table, 1.0)
        fill.fill(self.class_of, torch.arange(len(self.class_of)) % len(self.table))

    def forward(self, inputs, projection):
        return F.embedding(self.class_of[inputs.token_ids], self.table)
'''


@pytest.fixture
def module(workplace, monkeypatch):
    """A module with that source, and an overlay that names it."""
    (workplace / "by_class.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(workplace))
    value = {"source": "by_class.Classes", "layers": "last_third", "coefficient": "learned",
             "add_context": False, "shared": False, "source_args": {"n_class": 5}}  # fmt: skip
    overlay = {"model": {"config": {"value": value}}}
    (workplace / "classes.yaml").write_text(yaml.safe_dump(overlay))
    yield workplace / "by_class.py"
    sys.modules.pop("by_class", None)


@pytest.mark.slow
def test_code_settings_and_buffers_are_part_of_a_run(module, tiny_recipe, capsys):
    command = ["fit", "--config", str(tiny_recipe), "--config", "classes.yaml"]
    run = fit(tiny_recipe, "--config", "classes.yaml")
    checkpoint = find_checkpoint(run)
    facts = json.loads((run / "run.json").read_text())["value_source"]
    digest = hashlib.sha256(module.read_bytes()).hexdigest()
    assert facts == {"by_class": {"file": str(module), "sha256": digest}}
    for folder in (run, checkpoint):
        assert (folder / "code" / "by_class.py").read_bytes() == module.read_bytes()
    stored = yaml.safe_load((checkpoint / "config.yaml").read_text())["model"]["config"]["value"]
    assert stored["source_args"] == {"n_class": 5}

    model, _ = bov_lightning.load(checkpoint, dtype=torch.bfloat16)
    source = model.blocks[-1].attention.value.source
    kept = read_weights(checkpoint)["blocks.2.attention.value.source.class_of"]
    assert torch.equal(source.class_of, kept)
    assert torch.equal(kept, torch.arange(len(kept)) % 5)
    assert source.table.dtype == torch.bfloat16
    assert export(checkpoint, module.parent / "out") < 1e-5
    theirs, _ = load_export(module.parent / "out", "cpu", torch.float32)
    assert torch.equal(theirs.blocks[-1].attention.value.source.class_of, kept)
    assert main(["import", "hf", "out", "--output", "back"]) == 0
    again = read_weights(module.parent / "back")["blocks.2.attention.value.source.class_of"]
    assert again.dtype == torch.int64
    assert torch.equal(again, kept)

    capsys.readouterr()
    assert main([*command, "--model.config.value.source_args.n_class", "6"]) == 2
    assert "was trained with model.config.value.source_args.n_class 5, not 6" in (
        capsys.readouterr().err
    )
    module.write_text(SOURCE.replace("fill.normal", "fill.normal  "))
    for refused in (command, [*command, "--model.budget.steps", "9"]):
        assert main(refused) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"another {module}" in error
        assert "--resume changed_code" in error
    assert main([*command, "--resume", "changed_code"]) == 0
    digest = hashlib.sha256(module.read_bytes()).hexdigest()
    assert (
        json.loads((run / "run.json").read_text())["value_source"]["by_class"]["sha256"] == digest
    )


def test_the_files_of_a_class_are_those_that_it_inherits_from(module, monkeypatch):
    (module.parent / "derived.py").write_text(
        "import by_class\n\n\nclass More(by_class.Classes):\n    pass\n"
    )
    monkeypatch.setenv("BOV_TRUSTED_MODULES", "derived")
    assert own_code.files_of("derived.More") == {
        "derived": module.parent / "derived.py", "by_class": module
    }  # fmt: skip
    assert own_code.files_of("bank") == {}
    sys.modules.pop("derived")


def test_every_command_finds_mistakes_before_anything_trains(module, tiny_recipe, capsys):
    module.write_text(SOURCE.replace('("table", 0.5)', '"tables"'))
    for command in (
        ["plan", "--config", str(tiny_recipe), "--config", "classes.yaml"],
        ["fit", "--config", str(tiny_recipe), "--config", "classes.yaml"],
        ["sweep", "--config", str(tiny_recipe), "--values", "standard,classes.yaml", "--dry-run"],
        ["submit", "--config", str(tiny_recipe), "--config", "classes.yaml", "--dry-run"],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "source.table into 'tables', which is no group" in error
        assert error.count("\n") == 1
    assert not (module.parent / "runs").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["n_clas", "3"], "value.source_args.n_clas: did you mean value.source_args.n_class?"),
        (["n_class", "many"], "n_class is 'many', but must be an integer from 2 to 1,000"),
        (["n_class", "1"], "n_class is 1: from 2 to 1,000"),
        (["n_class", "2.5"], "n_class is 2.5, but must be an integer"),
    ],
)
def test_settings_are_checked(options, words, module, tiny_recipe, capsys):
    command = ["plan", "--config", str(tiny_recipe), "--config", "classes.yaml"]
    key = f"--model.config.value.source_args.{options[0]}"
    assert main([*command, key, options[1]]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_what_an_export_cannot_hold_is_said_before_training(module, tiny_recipe, capsys):
    module.write_text(f"{SOURCE}\n\ndef prefill():\n    pass\n")
    run = fit(tiny_recipe, "--config", "classes.yaml", "--model.budget.steps", "1")
    said = "prefill is what bov_lightning.model.prefill defines: give it another name in by_class"
    assert "warning: by_class.Classes cannot be exported" in (found := capsys.readouterr().err)
    assert said in found
    assert main(["export", str(run), "--output", "out"]) == 2
    assert said in capsys.readouterr().err
    assert not (module.parent / "out").exists()
    shutil.rmtree(run)
