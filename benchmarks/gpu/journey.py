"""Stage c: a run of the quickstart's recipe on the GPU, killed, resumed, and used in every way.

Beside it the same run on the CPU, for its first losses, and one that resumes the GPU's checkpoint
on the CPU.
"""

import contextlib
import csv
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from stage import Results, stage_parser
from text import options_of

from bov_lightning.cli import main as bov

STEPS = 60
N_LOSS = 10
"""First losses that are compared: later ones part, as any two runs in other arithmetic."""
TOY = [
    "--model.config.n_layer", "3", "--model.config.d_model", "64",
    "--model.config.sequence_len", "64", "--model.config.vocab_size", "300",
    "--data.init_args.tokenizer.vocab_size", "300", "--batch.tokens", "512", "--batch.micro", "8",
]  # fmt: skip


class Journey:
    """The runs, under one folder."""

    def __init__(self, folder: Path, device: str, more: list[str]):
        self.folder, self.device = folder, device
        self.common = [
            "--config", "quickstart", *more, "--seed", "1",
            "--data.init_args.directory", str(folder / "data"),
            "--model.budget.steps", str(STEPS), "--checkpoint.every_steps", "5",
            "--validation.every_steps", str(STEPS), "--validation.tokens", "32768",
            "--evaluation.tasks", "[]", "--trainer.log_every_n_steps", "1",
        ]  # fmt: skip

    def start(self, root: str, device: str) -> subprocess.Popen:
        """Starts `bov fit` of the run in that folder, or goes on with it."""
        kind = "gpu" if device == "cuda" else "cpu"
        precision = "bf16-mixed" if device == "cuda" else "32-true"
        words = ["--run.root", str(self.folder / root), "--run.name", "run",
                 "--trainer.accelerator", kind, "--trainer.precision", precision]  # fmt: skip
        cores = str(max(1, (os.cpu_count() or 2) // 2))
        with open(self.folder / f"{root}.log", "a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "bov_lightning.cli", "fit", *self.common, *words],
                stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": cores},
            )  # fmt: skip

    def log(self, root: str) -> str:
        """What the run has printed."""
        return (self.folder / f"{root}.log").read_text()

    def losses(self, root: str) -> list[float]:
        """Of the run's first steps."""
        path = self.folder / root / "run" / "metrics.csv"
        if not path.is_file():
            return []
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        return [float(row["train_loss"]) for row in rows if row.get("train_loss")][:N_LOSS]

    def has_checkpoint(self, root: str) -> bool:
        """Whether a complete one lies there."""
        return any((self.folder / root / "run" / "checkpoints").glob("step-*"))


def wait_for(condition, *processes: subprocess.Popen) -> None:
    """Returns when it holds, or one of the processes has ended."""
    while not condition() and all(process.poll() is None for process in processes):
        time.sleep(0.01)


def command(*words: str) -> tuple[bool, str]:
    """Runs a `bov` command in this process; whether it succeeded, and what it printed."""
    said = io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stdout(said):
        code = bov(list(words))
    text = said.getvalue()
    print(f"bov {words[0]}: {code}, {time.monotonic() - began:.1f} s\n{text}", flush=True)
    return code == 0, text


def number_in(pattern: str, text: str) -> float | None:
    """The last number after ``pattern`` in the text."""
    found = re.findall(pattern + r"\s+(-?[\d.]+(?:e-?\d+)?)", text)
    return float(found[-1].rstrip(".")) if found else None


def main() -> int:
    """Runs it all; 1 where something could not be done."""
    parser = stage_parser(__doc__)
    parser.add_argument("--text", type=Path, help="a folder of train-* and val-* files")
    options = parser.parse_args()
    results, device = Results(options.output), options.device
    folder = options.output.with_suffix("")
    folder.mkdir()
    more = TOY if options.toy else []
    if options.text or options.toy:
        more = [*more, *options_of(options.text, folder / "text", megabytes=1)]
    journey = Journey(folder, device, more)
    done: dict[str, bool] = {}

    done["prepared"], _ = command("prepare", *journey.common)
    # Both read what was prepared; the GPU's is killed at its first checkpoint.
    cpu, gpu = journey.start("cpu", "cpu"), journey.start("gpu", device)
    wait_for(lambda: journey.has_checkpoint("gpu"), gpu)
    done["killed"] = gpu.poll() is None
    gpu.send_signal(signal.SIGKILL)
    gpu.wait()
    if not journey.has_checkpoint("gpu"):
        cpu.kill()
        results.keep(done=done, summary=f"not trained: {journey.log('gpu').strip()[-200:]}")
        return 1
    shutil.copytree(folder / "gpu", folder / "moved")
    gpu, moved = journey.start("gpu", device), journey.start("moved", "cpu")
    wait_for(lambda: len(journey.losses("cpu")) == N_LOSS, cpu)
    cpu.kill()
    cpu.wait()
    done["resumed"] = gpu.wait() == 0 and "resuming" in journey.log("gpu")
    results.keep(done=done)

    run = str(folder / "gpu" / "run")
    on_device = ("--device", device, "--dtype", "bfloat16" if device == "cuda" else "float32")
    done["validated"], text = command("validate", run)
    val_bpb = number_in("val_bpb", text)
    done["generated"], _ = command(
        "generate", run, "--prompt", "def ", "--max-new-tokens", "40", *on_device
    )
    few = ("--max-per-task", "20") if options.toy else ()
    done["evaluated"], _ = command("evaluate", run, "--tasks", "heldout", *few, *on_device)
    done["exported"], text = command("export", run, "--output", str(folder / "export"))
    results.keep(done=done, export_difference=number_in("within", text))

    done["moved to a CPU"] = moved.wait() == 0 and "resuming" in journey.log("moved")
    results.keep(
        val_bpb=f"{val_bpb}, {number_in('val_bpb', journey.log('moved'))}",
        resumed=re.findall("resuming.*", journey.log("gpu") + journey.log("moved")),
    )
    losses = {root: journey.losses(root) for root in ("gpu", "cpu")}
    pairs = list(zip(losses["gpu"], losses["cpu"], strict=False))
    done["compared"] = len(pairs) == N_LOSS
    missing = [name for name, is_done in done.items() if not is_done]
    results.keep(
        losses=losses,
        loss_difference=max((abs(a - b) / b for a, b in pairs), default=None),
        done=done,
        summary=f"not {', '.join(missing)}" if missing else f"all {len(done)}",
    )
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
