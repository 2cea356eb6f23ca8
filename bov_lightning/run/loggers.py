"""Where a run's metrics go: metrics.csv and TensorBoard."""

import csv
from typing import Any

from lightning.pytorch.loggers.logger import Logger

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
        """Prepares for a run that goes on after ``step``."""
        raise NotImplementedError


class MetricsCSV(RunLogger):
    """Appends metrics to metrics.csv, one row per step; a resumed run replaces what it repeats."""

    def __init__(self, run: RunDirectory):
        super().__init__()
        self.run, self.path = run, run.metrics_file
        self.rows: dict[int, dict[str, Any]] = {}
        self._written: list[str] = []

    def resume_at(self, step: int) -> None:
        """Takes over the rows of an earlier part of the run, up to ``step``."""
        if self.path.is_file():
            for row in self.run.metrics():
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

    def __init__(self, run: RunDirectory):
        super().__init__()
        self.directory = run.path
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
