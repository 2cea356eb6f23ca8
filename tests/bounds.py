"""The fast tests and eight commands at the lowest and at the newest versions of the dependencies.

`make test-bounds`, or `python tests/bounds.py lower --torch 2.13.0`. Each end has a virtual
environment of its own under build/bounds, which stays there; a version of torch takes gigabytes.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
RECIPE = """\
run: {name: tiny}
model:
  config:
    n_layer: 3
    n_head: 2
    n_kv_head: 1
    d_model: 32
    vocab_size: 300
    sequence_len: 32
    window_pattern: L
    value:
      {source: bank, layers: last_third, coefficient: learned, add_context: false, shared: false}
  budget: {steps: 8}
batch: {tokens: 256, micro: 4}
checkpoint: {every_steps: 4}
validation: {every_steps: 4, tokens: 640}
data:
  class_path: data_modules.PackedDataModule
  init_args:
    directory: packed
    source: {class_path: data_modules.StandardLibrary}
    tokenizer: {vocab_size: 300}
trainer: {accelerator: cpu, devices: 1}
"""
COMMANDS = (
    "fit --config tiny.yaml", "validate runs/tiny",
    "generate runs/tiny --prompt def --max-new-tokens 5",
    "evaluate runs/tiny --tasks heldout --max-per-task 4", "export runs/tiny --output exported",
    "report runs/tiny --output report.html", "plan --config tiny.yaml",
    "plan --config tiny.yaml --inference",
)  # fmt: skip


def lowest(requirements: list[str]) -> list[str]:
    """Constraints that hold each requirement at its lower bound."""
    found = []
    for requirement in requirements:
        if match := re.fullmatch(r"([\w.-]+)(\[\w+\])?>=([\w.]+)", requirement):
            found.append(f"{match[1]}=={match[3]}")
    return found


def make_environment(end: str, torch: str | None) -> Path:
    """The interpreter of a new environment, in which the project's dependencies are installed.

    Args:
        end: lower or newest.
        torch: its version, where it is not the end's own.
    """
    directory = REPOSITORY / "build" / "bounds" / end
    venv.create(directory, with_pip=True, clear=True)
    python = directory / "bin" / "python"
    optional = PROJECT["optional-dependencies"]
    pins = lowest(PROJECT["dependencies"]) if end == "lower" else []
    if torch is not None:
        pins = [pin for pin in pins if not pin.startswith("torch==")] + [f"torch=={torch}"]
    (directory / "constraints.txt").write_text("\n".join(pins) + "\n")
    install = [
        python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint",
        directory / "constraints.txt",
    ]  # fmt: skip
    subprocess.run([*install, *PROJECT["dependencies"], *optional["test"]], check=True)
    if subprocess.run([python, "-c", "import triton"], stderr=subprocess.DEVNULL).returncode:
        # Where torch brings it along, its version is torch's.
        triton = lowest(optional["triton"]) if end == "lower" else ["triton"]
        subprocess.run([*install, *triton], check=True)
    return python


def run(python: Path) -> int:
    """How many of the tests' session and the commands have failed; prints what they say."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    marks = "not slow and not distributed and not slurm"
    tests = [python, "-m", "pytest", "-q", "-n", "2", "-m", marks]
    n_failed = int(subprocess.run(tests, cwd=REPOSITORY, env=environment).returncode != 0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny.yaml").write_text(RECIPE)
        for command in COMMANDS:
            done = subprocess.run(
                [python, "-m", "bov_lightning.cli", *command.split()], cwd=folder, env=environment,
                capture_output=True, text=True,
            )  # fmt: skip
            print(f"exit {done.returncode}: bov {command}", flush=True)
            if done.returncode:
                n_failed += 1
                print(done.stdout[-2000:], done.stderr[-4000:], flush=True)
    return n_failed


def main() -> int:
    """The exit code: 0 if all tests and commands passed at all ends that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ends", nargs="+", choices=("lower", "newest"))
    parser.add_argument("--torch", help="a version of torch in place of the end's own")
    options = parser.parse_args()
    n_failed = 0
    for end in options.ends:
        python = make_environment(end, options.torch)
        print(f"--- {end}:", flush=True)
        subprocess.run([python, "-m", "pip", "list", "--disable-pip-version-check"], check=True)
        n_failed += run(python)
    return int(n_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
