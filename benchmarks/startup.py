"""Start-up: how long a command takes before it does something, from the start of its process.

python benchmarks/startup.py [--recipe quickstart] [--repeats 5]

Machines differ, and importing torch is most of it: every time is also given in imports of torch.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import report

REPOSITORY = Path(__file__).parent.parent
BOV = [sys.executable, "-m", "bov_lightning.cli"]


def seconds_of(command: list[str], until: Path | None = None) -> float:
    """Seconds until the command ends, or until there is a row in the metrics ``until``."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_WAIT_POLICY": "passive"}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if until is not None:
        while process.poll() is None and not until.is_file():
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        process.terminate()
    _, error = process.communicate()
    if until is None:
        seconds = time.perf_counter() - started
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {error}")
    elif not until.is_file():
        raise RuntimeError(f"{' '.join(command)} took no step: {error}")
    return seconds


def main() -> None:
    """Prints one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="quickstart", help="what is planned and trained")
    parser.add_argument("--repeats", type=int, default=5, help="medians are over so many")
    parser.add_argument("--data", help="its prepared data; made in a temporary folder if not given")
    known = parser.parse_args()
    config = ["--config", known.recipe]
    names = ("import_torch", "help", "plan", "first_step", "first_token")
    found: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        data = ["--data.init_args.directory", known.data or f"{folder}/data"]
        seconds_of([*BOV, "prepare", *config, *data])
        for i in range(known.repeats):
            found["import_torch"].append(seconds_of([sys.executable, "-c", "import torch"]))
            found["help"].append(seconds_of([*BOV, "--help"]))
            found["plan"].append(seconds_of([*BOV, "plan", *config]))
            fit = [*BOV, "fit", *config, *data, "--trainer.log_every_n_steps", "1"]
            fit += ["--run.root", folder, "--run.name", f"run-{i}"]
            found["first_step"].append(seconds_of(fit, Path(folder, f"run-{i}", "metrics.csv")))
            # It has saved that step.
            generate = [*BOV, "generate", f"{folder}/run-{i}", "--prompt", "def"]
            found["first_token"].append(seconds_of([*generate, "--max-new-tokens", "1"]))
    seconds = {name: statistics.median(values) for name, values in found.items()}
    ratios = {
        f"{name}_vs_import_torch": seconds[name] / seconds["import_torch"] for name in names[1:]
    }
    report("startup", {"recipe": known.recipe, "repeats": known.repeats}, seconds, ratios)


if __name__ == "__main__":
    main()
