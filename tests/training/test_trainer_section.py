"""The trainer section, and what else of a recipe only a Trainer can tell: one line, exit code 2."""

from pathlib import Path

import pytest

from bov_lightning.cli import main

pytestmark = pytest.mark.slow

CALLBACKS = "lightning.pytorch.callbacks"
OWN = """
from lightning.pytorch import Callback


class Broken(Callback):
    def __init__(self, n: int = 1):
        raise KeyError("boom")


class Noted(Callback):
    def __init__(self, text: str = "", n: int = 1):
        open("noted", "w").write(f"{text!r} {n}")
"""


@pytest.fixture
def own_module(workplace, monkeypatch) -> None:
    (workplace / "trainer_section_callbacks.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(workplace))


def callback(name: str, **arguments: object) -> list[str]:
    given = ", ".join(f"{key}: {value}" for key, value in arguments.items())
    return ["--trainer.callbacks", f"[{{class_path: {name}, init_args: {{{given}}}}}]"]


MISTAKES = [
    (["--trainer.accelerator", "gpu"], "gpu"),
    (["--trainer.accelerator", "quantum"], "quantum"),
    (["--trainer.log_every_n_steps", "0"], "trainer.log_every_n_steps is 0: from 1"),
    (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run cannot be set"),
    (["--trainer.overfit_batches", "1"], "trainer.overfit_batches cannot be set"),
    (["--trainer.max_epochs", "3"], "trainer.max_epochs follows from model.budget"),
    (["--trainer.devices", "0"], "trainer.devices is 0"),
    (["--trainer.devices", "-3"], "trainer.devices is -3"),
    (["--trainer.devices", "[]"], "trainer.devices is []"),
    (["--trainer.num_nodes", "x"], "trainer.num_nodes is 'x', but must be an integer"),
    (["--trainer.precision", "17-odd"], "trainer.precision is '17-odd'"),
    (["--trainer.strategy", "nope"], "trainer.strategy 'nope' is not supported"),
    (["--trainer.strategy.class_path", "bov_lightning.Nope"], "bov_lightning.Nope cannot be"),
    (["--trainer.strategy", "{class_path: bov_lightning.ShardedStrategy, init_args: "
      "{replicate: 0}}"], "replicate is 0: from 1"),
    (["--trainer.logger", "{class_path: lightning.pytorch.loggers.NoSuch}"],
     "trainer.logger.class_path lightning.pytorch.loggers.NoSuch cannot be imported"),
    (["--trainer.logger", "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: "
      "{save_dri: x}}"], "did you mean trainer.logger.init_args.save_dir?"),
    (["--trainer.profiler", "x"], "profiler"),
    (callback(f"{CALLBACKS}.ModelCheckpoint"), "the checkpoint section says"),
    (callback(f"{CALLBACKS}.RichProgressBar"), "bov shows its own"),
    (callback(f"{CALLBACKS}.EarlyStopping"), "required: monitor"),
    (callback("trainer_section_callbacks.Broken"), "trainer_section_callbacks.Broken: KeyError"),
    (callback("trainer_section_callbacks.Missing"), "Missing cannot be imported"),
    (callback("trainer_section_callbacks.Noted", n="x"), "n is 'x', but must be int"),
    (["--data.class_path", "data_modules.StandardLibrary"], "is no LightningDataModule"),
    (["--data.init_args.source.class_path", "data_modules.PackedDataModule"], "is no TextSource"),
    (["--data.init_args.source", "5"], "must be a class_path of a TextSource"),
    (["--data.init_args.packing", "5"], "must be a mapping of kind and buffer"),
    (["--data.init_args.packing.knd", "concat"], "did you mean data.init_args.packing.kind?"),
    (["--data.init_args.packing.kind", "no"], "best_fit or concat"),
    (["--data.init_args.n_shard", "0"], "data.init_args.n_shard is 0: from 1"),
    (["--data.init_args.n_shard", "x"], "data.init_args.n_shard is 'x', but must be an integer"),
    (["--data.init_args", "5"], "data.init_args is 5, but must be a mapping"),
    (["--model.config.document_start", "5"], "front of documents is id 0"),
    (["--model.config.document_start", "1000"], "front of documents is id 0"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_mistakes_are_one_line(tiny_recipe, own_module, capsys, options, words):
    if options == ["--trainer.accelerator", "gpu"]:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is one")
    assert main(["fit", "--config", str(tiny_recipe), *options]) == 2
    lines = [x for x in capsys.readouterr().err.split("\n") if x.startswith("bov: error: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert not Path("runs").exists()


def test_a_callback_that_finds_no_metric_is_one_line(tiny_recipe, capsys):
    options = callback(f"{CALLBACKS}.EarlyStopping", monitor="nothing")
    assert main(["fit", "--config", str(tiny_recipe), *options]) == 2
    assert "`nothing` which is not available" in capsys.readouterr().err


def test_arguments_of_somebodys_callback_are_text(tiny_recipe, own_module):
    name = "{class_path: trainer_section_callbacks.Noted}"
    options = ["--trainer.callbacks", name, "--trainer.callbacks.init_args.text", "12_5"]
    steps = ["--model.budget.steps", "1", "--validation.tokens", "64"]
    assert main(["fit", "--config", str(tiny_recipe), *options, *steps]) == 0
    assert Path("noted").read_text() == "'12_5' 1"


@pytest.mark.slow
def test_a_run_is_called_as_it_is_written(tiny_recipe):
    """The whole way: files, checkpoint, and the same command again."""
    name = "exp #2"
    steps = ["--model.budget.steps", "1", "--validation.tokens", "64"]
    for _ in range(2):
        assert main(["fit", "--config", str(tiny_recipe), "--run.name", name, *steps]) == 0
    assert [path.name for path in Path("runs").iterdir()] == [name]
    assert main(["validate", f"runs/{name}"]) == 0
    assert main(["fit", "--config", f"runs/{name}/config.yaml"]) == 0


def test_the_token_of_documents_may_be_named(tiny_recipe):
    steps = ["--model.budget.steps", "1", "--validation.tokens", "64"]
    assert main(["fit", "--config", str(tiny_recipe), "--model.config.document_start", "0",
                 *steps]) == 0  # fmt: skip
