"""Measures a run while it trains, shows and logs it."""

import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from bov_lightning.console import CONSOLE, say
from bov_lightning.model.counting import flops_per_token
from bov_lightning.planning.devices import peak_flops
from bov_lightning.run.loggers import MetricsCSV
from bov_lightning.run.reference import Reference
from bov_lightning.run.status import Status
from bov_lightning.training.callbacks.guard import guard_of
from bov_lightning.training.live_view import LiveView, can_be_live


class Reporter(Callback):
    """Measures loss, bits per byte, tokens per second and MFU; shows them and logs them."""

    def __init__(
        self,
        status: Status,
        reference: Path | None = None,
        validation_tokens: int | None = None,
        lines_every_s: float = 30.0,
    ):
        """
        Args:
            status: what the live view shows, on rank 0 and in a terminal.
            reference: directory of another run, to compare val_bpb with.
            validation_tokens: validation.tokens of this run.
            lines_every_s: seconds between two lines where the output is no terminal.
        """
        self.status, self.lines_every_s = status, lines_every_s
        self.reference_directory, self.validation_tokens = reference, validation_tokens
        self.reference: Reference | None = None
        self.view: LiveView | None = None
        self.validated_step = self.measured_step = -1
        self.every_steps = 1
        self.measured_at = self.counted_at = self.line_at = time.monotonic()
        self.train_seconds = 0.0
        self.flops_per_token, self.peak_flops = 0, math.nan

    @property
    def latest(self) -> dict[str, float]:
        """What was measured last, by its name in metrics.csv."""
        return self.status.latest

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Starts the clock, and the view on rank 0."""
        self.guard = guard_of(trainer)
        self.measured_step = trainer.global_step
        self.every_steps = trainer.log_every_n_steps
        self.measured_at = self.counted_at = self.line_at = time.monotonic()
        self.flops_per_token = flops_per_token(module.config)
        self.peak_flops = peak_flops(module.device) * trainer.world_size
        status = self.status
        status.max_steps, status.tokens_per_step = trainer.max_steps, module.batch_tokens
        status.step = status.first_step = trainer.global_step
        status.started_at = status.stepped_at = self.measured_at
        files = [x for x in trainer.loggers if isinstance(x, MetricsCSV)]
        self.train_seconds = sum(file.train_seconds for file in files)
        for file in files:
            self._recall(file.rows)
        if self.reference_directory is not None:
            data = trainer.datamodule.fingerprint
            self.reference = Reference(self.reference_directory, data, self.validation_tokens)
            self._compare(trainer)
        if trainer.is_global_zero and can_be_live(CONSOLE):
            self.view = LiveView(CONSOLE, status)
            status.is_shown = True
            self.view.start()

    def _recall(self, rows: dict[int, dict[str, Any]]) -> None:
        """Takes over what an earlier part of the run has measured."""
        for step in sorted(rows):
            if "train_loss" in rows[step]:
                self.status.losses.add(float(rows[step]["train_loss"]))
            if "val_bpb" in rows[step]:
                self.status.validated_step = step
                self.latest["val_bpb"] = float(rows[step]["val_bpb"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """Measures every trainer.log_every_n_steps steps and at the end."""
        step, status, guard = trainer.global_step, self.status, self.guard
        if step == status.step:
            return
        now = time.monotonic()
        status.step, status.stepped_at, status.loss = step, now, guard.loss
        status.skipped_steps, status.loss_spikes = guard.n_skipped, guard.n_spike
        status.losses.add(guard.loss)
        due = step % self.every_steps == 0 or step == trainer.max_steps
        if not due or step == self.measured_step:
            return
        optimizer = trainer.optimizers[0]
        seconds, n_step = now - self.measured_at, step - self.measured_step
        tokens_per_s = n_step * module.batch_tokens / seconds
        self.measured_step, self.measured_at = step, now
        self._count_time()
        status.latest |= {
            "train_loss": guard.loss,
            "grad_norm": optimizer.gradient_norm,
            "skipped_steps": guard.n_skipped,
            "loss_spikes": guard.n_spike,
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

    def on_validation_batch_start(self, trainer, module, batch, batch_index, *arguments) -> None:
        """Says how far the validation is."""
        n_batch = trainer.num_val_batches[0]
        self.status.activity = f"validating: batch {batch_index + 1:,} of {n_batch:,}"

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Logs val_bpb, at the step that it belongs to, and leaves validation out of tokens/s."""
        self.validated_step = self.status.validated_step = trainer.global_step
        self.status.activity = ""
        self.latest["val_bpb"] = float(trainer.callback_metrics["val_bpb"])
        self._compare(trainer)
        if trainer.state.fn == "fit":
            measured = {"val_bpb": self.latest["val_bpb"]}
            step = trainer.global_step
            self._log(trainer, measured | self._position(step, module), step)
            self._show(trainer, trainer.global_step, time.monotonic(), always=True)
            self.leave_out(trainer)

    def _compare(self, trainer: Trainer) -> None:
        """Sets val_bpb beside the reference's; that they cannot be compared is said once."""
        step = self.status.validated_step
        if self.reference is None or not trainer.is_global_zero:
            return
        tokens = (step or 0) * self.status.tokens_per_step
        found = self.reference.compare(tokens, self.latest.get("val_bpb", math.nan))
        if found.is_final:
            say(f"warning: run.reference {self.reference.directory}: {found.reason}, so that bits "
                "per byte are not compared")  # fmt: skip
            self.reference = None
        elif not self.reference.directory.is_dir() and step is None:
            say(f"warning: run.reference {self.reference.directory} does not exist yet")
        elif step is not None:
            self.status.comparison = str(found)

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
        """A line, where there is no view."""
        if self.view is not None or not trainer.is_global_zero:
            return
        if always or now - self.line_at >= self.lines_every_s or step == trainer.max_steps:
            self.line_at = now
            left = self.status.seconds_left(now)
            eta = f"ETA {left / 60:.1f} min" if math.isfinite(left) else ""
            say(f"step {step}/{trainer.max_steps}  {numbers_line(self.status)}  {eta}")

    def stop(self) -> None:
        """Leaves the last picture on the screen, and the terminal as it was."""
        if self.view is not None:
            self.view.stop()
            self.view, self.status.is_shown = None, False

    def on_exception(self, trainer: Trainer, module: LightningModule, exception) -> None:
        """Leaves the terminal usable."""
        self.stop()


def reporter_of(trainer: Trainer) -> Reporter | None:
    """The trainer's `Reporter`, if it has one."""
    return next((found for found in trainer.callbacks if isinstance(found, Reporter)), None)


def numbers_line(status: Status) -> str:
    """The numbers of a line; MFU is "-" where the device's peak is not known."""
    latest = status.latest
    mfu = latest.get("mfu", math.nan)
    difference = f" ({status.comparison})" if status.comparison else ""
    parts = [
        f"loss {latest['train_loss']:.4f}" if "train_loss" in latest else "",
        f"val_bpb {latest['val_bpb']:.4f}{difference}" if "val_bpb" in latest else "",
        f"{latest['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in latest else "",
        "MFU -" if math.isnan(mfu) else f"MFU {mfu:.1%}",
    ]
    return "  ".join(part for part in parts if part)
