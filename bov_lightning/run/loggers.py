"""Where a run's metrics go: metrics.csv and TensorBoard."""

import csv
import math
import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from bov_lightning.console import say
from bov_lightning.errors import UserError
from bov_lightning.run.directory import RunDirectory


class RunLogger(Logger):
    """A logger of one run directory, which needs neither a name nor a version of its own."""

    @property
    def name(self) -> str:
        """Empty: the run directory is the name."""
        return ""

    @property
    def version(self) -> str:
        """Empty."""
        return ""

    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: config.yaml holds them."""

    def resume_at(self, step: int) -> None:
        """Prepares for a run that goes on after ``step``; 0: it begins, whatever was there."""
        raise NotImplementedError


def never_end_a_run(logger: Logger) -> None:
    """Has a logger that fails say so once, and nothing more: training goes on without it.

    Disks of logs fill up, and services of others are not always there.
    """
    said: list[Exception] = []

    def tolerant(method: Callable) -> Callable:
        @wraps(method)
        def call(*args, **kwargs) -> None:
            try:
                method(*args, **kwargs)
            except Exception as error:
                if not said:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    say(f"warning: {type(logger).__name__} cannot log: {reason}; training goes on")
                said.append(error)

        return call

    for name in ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "resume_at"):
        if not hasattr(logger, name):
            continue
        setattr(logger, name, tolerant(getattr(logger, name)))


class MetricsCSV(RunLogger):
    """Appends metrics to metrics.csv, one row per step; a resumed run replaces what it repeats."""

    def __init__(self, run: RunDirectory):
        super().__init__()
        self.run, self.path = run, run.metrics_file
        self.rows: dict[int, dict[str, Any]] = {}
        self._written: list[str] | None = None
        """The columns of the file; None before it is written, and after that has failed: what is
        missing comes with the next row, in a file made anew."""

    def resume_at(self, step: int) -> None:
        """Takes over the rows of an earlier part of the run, up to ``step``."""
        if step and self.path.is_file():
            try:
                rows = self.run.metrics()
            except UserError:
                self.path.replace(self.path.with_name("metrics.csv.unreadable"))
                raise
            for row in rows:
                if row.get("step", "").isdigit() and int(row["step"]) <= step:
                    self.rows[int(row["step"])] = row

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
        written, self._written = self._written, None
        if is_new_row and columns == written:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns).writerow(row)
            self._written = columns
            return
        aside = self.path.with_name(".metrics.csv.partial")
        with open(aside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows[step] for step in sorted(self.rows))
        aside.replace(self.path)
        self._written = columns


def _leave_writers_failures_to_us() -> None:
    """TensorBoard's thread hands its failure on, and prints a traceback as well."""
    before = threading.excepthook
    if getattr(before, "is_ours", False):
        return

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            before(arguments)

    hook.is_ours = True
    threading.excepthook = hook


class TensorBoardEvents(RunLogger):
    """TensorBoard events in the run directory, which appear with the first metric."""

    RETRY_AFTER_S = 60.0
    """After a failure, in a file of its own."""

    def __init__(self, run: RunDirectory):
        super().__init__()
        self.directory = run.path
        self.purge_step: int | None = None
        self._writer = None
        self._retry_at = -math.inf

    def resume_at(self, step: int) -> None:
        """Hides what an earlier part of the run wrote after ``step``."""
        self.purge_step = step + 1 if step else 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Writes one scalar per metric."""
        if self._writer is None and time.monotonic() >= self._retry_at:
            self._try(self._open)
        if self._writer is not None:
            self._try(lambda: self._add(metrics, step))

    def save(self) -> None:
        """Writes what is buffered."""
        if self._writer is not None:
            self._try(self._writer.flush)

    def _add(self, metrics: dict[str, float], step: int | None) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory} is gone")
        _leave_writers_failures_to_us()
        if not any(self.directory.glob("events.out.tfevents.*")):
            # Nothing to hide; a watcher that starts in the same second would lose its events.
            self.purge_step = None
        if self.purge_step is not None:
            self._set_back(int(time.time()))
        self._writer = SummaryWriter(self.directory, purge_step=self.purge_step)
        self.purge_step = None

    def _set_back(self, now: int) -> None:
        """Has the files of earlier parts come before this one's, which are read by their names.

        A clock that was set back would have them read, and shown, in the wrong order.
        """
        files = sorted(self.directory.glob("events.out.tfevents.*"))
        for i, file in enumerate(files):
            stamp, _, rest = file.name.removeprefix("events.out.tfevents.").partition(".")
            if stamp.isdigit() and int(stamp) >= now:
                earlier = f"events.out.tfevents.{now - len(files) + i:010d}.{rest}"
                file.rename(file.with_name(earlier))

    def _try(self, work: Callable[[], None]) -> None:
        """What fails is left alone for a while: its thread has ended, and with it the file."""
        try:
            work()
        except Exception:
            self._writer, self._retry_at = None, time.monotonic() + self.RETRY_AFTER_S
            raise
