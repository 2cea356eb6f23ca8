"""Value sources from outside of the package: whose recipe names them, and who may import them."""

import ast
import inspect
import sys

import pytest
import spoilt  # noqa: F401 - its classes are named by their paths
import torch
import yaml
from runs import fit
from variants import OVERLAYS, make_model, perturb, token_ids

import bov_lightning
from bov_lightning.checkpoint.directory import CONFIG, find_checkpoint, write_marker
from bov_lightning.checkpoint.writing import config_yaml, write_checkpoint
from bov_lightning.cli import main
from bov_lightning.errors import UserError
from bov_lightning.interop.hf_export import export
from bov_lightning.model.config import ValueConfig
from bov_lightning.model.lookup import class_path
from bov_lightning.model.values import BankOfValues

SOURCE = '''
"""Values of somebody's own."""

from pathlib import Path

from bov_lightning.model.values import InitialEmbeddingValue

Path("imported").touch()


class Doubled(InitialEmbeddingValue):
    """Twice the initial embedding's value."""

    def forward(self, inputs, projection):
        """(B, T, V)."""
        return 2 * super().forward(inputs, projection)
'''


@pytest.fixture
def module(workplace, monkeypatch):
    """A module of somebody's own that says when it is imported, and an overlay that names it."""
    name = "my_values"
    (workplace / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.delenv("BOV_TRUSTED_MODULES", raising=False)
    value = {"source": f"{name}.Doubled", "layers": "last_third", "coefficient": "learned",
             "add_context": False, "shared": False}  # fmt: skip
    overlay = {"model": {"config": {"value": value}}}
    (workplace / "doubled.yaml").write_text(yaml.safe_dump(overlay))
    yield name
    sys.modules.pop(name, None)


def strangers_checkpoint(workplace, source: str):
    """A complete checkpoint whose configuration names ``source``."""
    model = make_model(OVERLAYS["initial_embedding"])
    write_checkpoint(workplace / "theirs", 3, model.state_dict(), config_yaml(model.config))
    path = workplace / "theirs" / CONFIG
    path.write_text(path.read_text().replace("initial_embedding", source))
    size, checksum = path.stat().st_size, bov_lightning.checkpoint.directory.checksum(path)
    marker = bov_lightning.checkpoint.directory.read_marker(workplace / "theirs")
    files = marker["files"] | {CONFIG: {"bytes": size, "crc32": checksum}}
    write_marker(workplace / "theirs", 3, files)
    return workplace / "theirs"


@pytest.mark.parametrize("command", ["validate", "generate", "export", "load"])
def test_a_checkpoint_imports_nothing(command, module, workplace, capsys):
    theirs = strangers_checkpoint(workplace, f"{module}.Doubled")
    options = {"generate": ["--prompt", "x"], "export": ["--output", "out"]}
    if command == "load":
        with pytest.raises(UserError, match="BOV_TRUSTED_MODULES=my_values"):
            bov_lightning.load(theirs)
    else:
        assert main([command, str(theirs), *options.get(command, [])]) == 2
        assert "BOV_TRUSTED_MODULES=my_values" in capsys.readouterr().err
    assert module not in sys.modules
    assert not (workplace / "imported").exists()
    assert not (workplace / "out").exists()


@pytest.mark.slow
def test_an_export_imports_nothing(module, workplace, capsys):
    export(write_bank(workplace), workplace / "theirs")
    path = workplace / "theirs" / "config.json"
    path.write_text(path.read_text().replace('"source": "bank"', f'"source": "{module}.Doubled"'))
    for command in (["generate", "theirs", "--prompt", "x"], ["import", "hf", "theirs"]):
        assert main([*command, *(["--output", "out"] if command[0] == "import" else [])]) == 2
        assert "is not imported" in capsys.readouterr().err
    assert not (workplace / "imported").exists()


def write_bank(workplace):
    model = make_model(OVERLAYS["bov"])
    write_checkpoint(workplace / "ours", 3, model.state_dict(), config_yaml(model.config))
    return workplace / "ours"


def test_who_trusts_a_module_reads_its_checkpoints(module, workplace, monkeypatch):
    theirs = strangers_checkpoint(workplace, f"{module}.Doubled")
    monkeypatch.setenv("BOV_TRUSTED_MODULES", f"another,{module}")
    model, _ = bov_lightning.load(theirs)
    assert (workplace / "imported").exists()
    assert class_path(type(model.blocks[-1].attention.value.source)) == f"{module}.Doubled"


@pytest.mark.slow
def test_ones_own_recipe_trains_and_goes_on(module, tiny_recipe, capsys):
    run = fit(tiny_recipe, "--config", "doubled.yaml")
    assert (run / "checkpoints" / "step-00000008").is_dir()
    stored = yaml.safe_load((find_checkpoint(run) / CONFIG).read_text())
    assert stored["model"]["config"]["value"]["source"] == f"{module}.Doubled"
    fit(tiny_recipe, "--config", "doubled.yaml")
    assert main(["validate", str(run)]) == 0
    assert main(["validate", str(run), "--config", "doubled.yaml"]) == 0


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.Source", "no module nowhere"),
        ("my_values.Missing", "has no value source Missing; it has Doubled"),
        ("os.path", "module os has no value source path; it has none"),
        ("bov_lightning.model.values.ValueSource", "has no value source ValueSource"),
        ("my_values..Doubled", "no class path"),
        (".Doubled", "no class path"),
    ],
)
def test_what_is_no_value_source_is_refused(source, words, module, tiny_recipe, capsys):
    options = ["--config", str(tiny_recipe), "--model.config.value.source", source]
    assert main(["plan", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_module_that_fails_to_import_something_else_is_not_blamed(module, tiny_recipe):
    """Its author wants the traceback."""
    with open("my_values.py", "a") as file:
        file.write("import a_library_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
        main(["plan", "--config", str(tiny_recipe), "--config", "doubled.yaml"])


def test_a_class_that_is_there_needs_no_module(module, workplace, monkeypatch):
    """That of an export's file is, where the module that it came from is trusted but not there."""
    known = __import__(module).Doubled
    sys.modules.pop(module)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x != str(workplace)])
    monkeypatch.setenv("BOV_TRUSTED_MODULES", module)
    with pytest.raises(ModuleNotFoundError):
        __import__(module)
    assert bov_lightning.model.values.source_class(f"{module}.Doubled") is known
    with pytest.raises(UserError, match=f"no module {module}"):
        bov_lightning.model.values.source_class(f"{module}.Tripled")


@torch.no_grad()
def test_an_export_must_decode_what_the_whole_text_gives(workplace):
    """The last line of defence, for checkpoints that were trained before there was a trial."""
    model = perturb(make_model({"source": "spoilt.Neighbour"}), 0.5)
    write_checkpoint(workplace / "theirs", 3, model.state_dict(), config_yaml(model.config))
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(UserError, match=r"decodes other logits .* spoilt.Neighbour looks at"):
            export(workplace / "theirs", workplace / "out", dtype=dtype)
    assert not (workplace / "out").exists()


def test_a_module_that_is_loaded_again_counts(module):
    import importlib

    first = importlib.import_module(module).Doubled
    again = importlib.reload(sys.modules[module]).Doubled
    assert first is not again
    assert bov_lightning.model.values.source_class(f"{module}.Doubled") is again
    assert ValueConfig("bank") == ValueConfig("bank")
    assert bov_lightning.model.values.source_class("bank") is BankOfValues


@torch.no_grad()
def test_a_name_of_the_package_cannot_be_taken(module, workplace):
    text = (workplace / "my_values.py").read_text()
    text = text.replace("    def forward", '    name = "initial_embedding"\n\n    def forward')
    (workplace / "my_values.py").write_text(text)
    __import__(module)
    ids = token_ids(30)
    taken = perturb(make_model({"source": "initial_embedding"}), 0.5)(ids)
    doubled = perturb(make_model({"source": f"{module}.Doubled"}), 0.5)(ids)
    assert not torch.allclose(taken, doubled)


@pytest.mark.parametrize(
    "line",
    ["import numpy as np", "from bov_lightning.model.layers import Linear as L",
     *(pytest.param(line, marks=pytest.mark.slow) for line in (
         "from . import x", "import bov_lightning.model.layers",
         "from bov_lightning.model import values",
         "from bov_lightning.checkpoint.writing import config_yaml"))],
)  # fmt: skip
def test_an_export_is_refused_a_module_that_needs_more(line, workplace, monkeypatch, capsys):
    name = "needs_more"
    text = SOURCE.replace("from pathlib import Path\n", f"def _later():\n    {line}\n")
    (workplace / f"{name}.py").write_text(text.replace('Path("imported").touch()\n', ""))
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.setenv("BOV_TRUSTED_MODULES", name)
    theirs = strangers_checkpoint(workplace, f"{name}.Doubled")
    assert main(["export", str(theirs), "--output", "out"]) == 2
    assert line in capsys.readouterr().err
    assert not (workplace / "out").exists()
    sys.modules.pop(name, None)


LAID_OUT = '''\
"""A source of my own,{page}laid out in its own way."""; from __future__ import division
{page}
import os
import sys; from typing import TYPE_CHECKING
import torch{page}
from bov_lightning.model.layers import Linear; SCALE = {scale}
{page}
from bov_lightning.model.values import (  # of the package
    InitialEmbeddingValue,
)

if TYPE_CHECKING:
    from bov_lightning.model.config import TransformerConfig
try:
    from bov_lightning.model.layers import Linear
except ImportError:
    Linear = None
if SCALE: from bov_lightning.model.layers import Linear

SIGNS = "é{page}µ"; from bov_lightning.model.layers import Linear; import math


class Doubled(InitialEmbeddingValue):
    """Twice the initial embedding's value."""
{page}
    def forward(self, inputs, projection):
        """(B, T, V)."""
        from bov_lightning.model.layers import Linear; scale = SCALE
        assert issubclass(Linear, torch.nn.Module) and len(SIGNS) == {n_sign}
        return math.copysign(scale, 1) * super().forward(inputs, projection)


def config(model: "TransformerConfig") -> str:
    from bov_lightning.model.layers import Linear
{page}
def nothing(): return os.sep, sys.path
'''


@pytest.mark.slow
@pytest.mark.parametrize("page", ["", "\f", "\n\f\n", "\x0b", "\x1c", "\x85", "\u2028"])
def test_no_own_import_is_left_however_a_file_is_laid_out(page, workplace, monkeypatch):
    """Page breaks are white space of Python, the others stand in strings; none ends a line."""
    text = LAID_OUT.replace('"é{page}µ"', f'"é{page.strip(chr(10))}µ"')
    text = text.format(page=page if "\f" in page else "", scale=2, n_sign=2 + bool(page))
    (workplace / "laid_out.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(workplace))
    __import__("laid_out")
    model = perturb(make_model({"source": "laid_out.Doubled"}), 0.5)
    write_checkpoint(workplace / "ours", 3, model.state_dict(), config_yaml(model.config))
    assert export(workplace / "ours", workplace / "out") < 1e-4
    code = (workplace / "out" / "modeling_bov.py").read_text(encoding="utf-8")
    assert "import bov_lightning" not in code
    assert "from bov_lightning" not in code
    sys.modules.pop("laid_out", None)


def test_the_networks_own_files_are_kept_line_by_line():
    """What is taken out are whole lines; none of them is changed."""
    from bov_lightning.interop import hf_source

    for part in hf_source.PARTS:
        code = inspect.getsource(part)
        kept = hf_source._without(code, ast.parse(code)).split("\n")
        remaining = iter(code.split("\n"))
        assert all(line in remaining for line in kept)
