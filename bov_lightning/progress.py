"""What a run says about itself while it trains: metrics.csv, TensorBoard, one line on screen."""

import csv
import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from bov_lightning.budget import flops_per_token, peak_flops
from bov_lightning.control import control_of


class RunLogger(Logger):
    """A logger of one run directory, which needs neither a name nor a version of its own."""

    @property
    def name(self) -> str:
        """None: the run directory is the name."""
        return ""

    @property
    def version(self) -> str:
        """None."""
        return ""

    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: config.yaml holds them."""

    def resume_at(self, step: int) -> None:
        """Prepares for a run that goes on after ``step``."""
        raise NotImplementedError


class MetricsCSV(RunLogger):
    """Appends metrics to metrics.csv, one row per step; a resumed run replaces what it repeats."""

    def __init__(self, directory: Path):
        super().__init__()
        self.path = directory / "metrics.csv"
        self.rows: dict[int, dict[str, Any]] = {}
        self._written: list[str] = []

    def resume_at(self, step: int) -> None:
        """Takes over the rows of an earlier part of the run, up to ``step``."""
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row["step"].isdigit() and int(row["step"]) <= step:
                        self.rows[int(row["step"])] = {k: v for k, v in row.items() if v}

    @property
    def train_seconds(self) -> float:
        """How long an earlier part of the run had trained when it wrote its last row."""
        return max((float(row.get("train_seconds", 0)) for row in self.rows.values()), default=0.0)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds columns to the row of ``step`` and writes the file."""
        step = step or 0
        row = self.rows.setdefault(step, {"step": step})
        is_new_row = len(row) == 1
        row.update(metrics)
        columns = list(dict.fromkeys(key for r in self.rows.values() for key in r))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if is_new_row and columns == self._written:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns).writerow(row)
            return
        aside = self.path.with_name(".metrics.csv.partial")
        with open(aside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows[step] for step in sorted(self.rows))
        aside.replace(self.path)
        self._written = columns


class TensorBoardEvents(RunLogger):
    """TensorBoard events in the run directory, which appear with the first metric."""

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory
        self.purge_step: int | None = None
        self._writer = None

    def resume_at(self, step: int) -> None:
        """Hides what an earlier part of the run wrote after ``step``."""
        self.purge_step = step + 1

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Writes one scalar per metric."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.directory, purge_step=self.purge_step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def save(self) -> None:
        """Writes what is buffered."""
        if self._writer is not None:
            self._writer.flush()


class _Numbers(ProgressColumn):
    """The latest numbers of the run."""

    def render(self, task) -> Text:
        return Text(task.fields["numbers"])


class Reporter(Callback):
    """Measures loss, bits per byte, tokens per second and MFU; shows them and logs them."""

    def __init__(self, lines_every_s: float = 30.0):
        """``lines_every_s``: seconds between two lines where the output is no terminal."""
        self.lines_every_s = lines_every_s
        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        self.latest: dict[str, float] = {}
        self.validated_step = -1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Starts the clock, and the bar on rank 0."""
        self.measured_step = self.first_step = trainer.global_step
        self.every_steps = trainer.log_every_n_steps
        self.measured_at = self.started_at = self.line_at = time.monotonic()
        self.counted_at = self.measured_at
        self.train_seconds = sum(
            x.train_seconds for x in trainer.loggers if isinstance(x, MetricsCSV)
        )
        self.flops_per_token = flops_per_token(module.config)
        self.peak_flops = peak_flops(module.device) * trainer.world_size
        if trainer.is_global_zero and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description} {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                _Numbers(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task(
                "step", total=trainer.max_steps, completed=self.first_step, numbers=""
            )
            self.progress.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """Measures every trainer.log_every_n_steps steps and at the end."""
        step = trainer.global_step
        due = step % self.every_steps == 0 or step == trainer.max_steps
        if not due or step == self.measured_step:
            return
        control, optimizer = control_of(trainer), trainer.optimizers[0]
        now = time.monotonic()
        seconds, n_step = now - self.measured_at, step - self.measured_step
        tokens_per_s = n_step * module.batch_tokens / seconds
        self.measured_step, self.measured_at = step, now
        self._count_time()
        self.latest |= {
            "train_loss": control.loss,
            "grad_norm": optimizer.gradient_norm,
            "skipped_steps": control.n_skipped,
            "loss_spikes": control.n_spike,
            "lr_factor": trainer.optimizers[0].param_groups[0]["lr"]
            / trainer.lr_scheduler_configs[0].scheduler.base_lrs[0],
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * self.flops_per_token / self.peak_flops,
        }
        shown = {k: v for k, v in self.latest.items() if k != "val_bpb" and not math.isnan(v)}
        self._log(trainer, {**shown, **self._position(step, module)}, step)
        self._show(trainer, step, now)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Counts the training up to here."""
        if trainer.state.fn == "fit":
            self._count_time()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Logs val_bpb, at the step that it belongs to, and leaves validation out of tokens/s."""
        self.validated_step = trainer.global_step
        self.latest["val_bpb"] = float(trainer.callback_metrics["val_bpb"])
        if trainer.state.fn == "fit":
            measured = {"val_bpb": self.latest["val_bpb"]}
            step = trainer.global_step
            self._log(trainer, measured | self._position(step, module), step)
            self._show(trainer, trainer.global_step, time.monotonic(), always=True)
            self.leave_out(trainer)

    def leave_out(self, trainer: Trainer) -> None:
        """Leaves the time since the last step, spent on something else, out of tokens/s."""
        self.measured_step = trainer.global_step
        self.measured_at = self.counted_at = time.monotonic()

    def _count_time(self) -> None:
        now = time.monotonic()
        self.train_seconds += now - self.counted_at
        self.counted_at = now

    def _position(self, step: int, module: LightningModule) -> dict[str, float]:
        """Where a row stands: tokens seen, and seconds of training without what interrupted it."""
        return {"tokens": step * module.batch_tokens, "train_seconds": self.train_seconds}

    def _log(self, trainer: Trainer, metrics: dict[str, float], step: int) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)

    def _show(self, trainer: Trainer, step: int, now: float, always: bool = False) -> None:
        if not trainer.is_global_zero:
            return
        numbers = numbers_line(self.latest)
        if self.progress is not None:
            self.progress.update(self.task, completed=step, numbers=numbers)
        elif always or now - self.line_at >= self.lines_every_s or step == trainer.max_steps:
            self.line_at = now
            rate = (step - self.first_step) / (now - self.started_at)
            left = (trainer.max_steps - step) / rate if rate else math.nan
            eta = f"ETA {left / 60:.1f} min" if math.isfinite(left) else ""
            line = f"step {step}/{trainer.max_steps}  {numbers}  {eta}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Takes the bar away."""
        self._stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception) -> None:
        """Leaves the terminal usable."""
        self._stop()


def numbers_line(latest: dict[str, float]) -> str:
    """The numbers of the progress line; MFU is "-" where the device's peak is not known."""
    mfu = latest.get("mfu", math.nan)
    parts = [
        f"loss {latest['train_loss']:.4f}" if "train_loss" in latest else "",
        f"val_bpb {latest['val_bpb']:.4f}" if "val_bpb" in latest else "",
        f"{latest['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in latest else "",
        "MFU -" if math.isnan(mfu) else f"MFU {mfu:.1%}",
    ]
    return "  ".join(part for part in parts if part)
