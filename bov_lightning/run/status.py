"""How far a run is, as numbers for the screen."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

SPARKLINE_COLUMNS = 24


class History:
    """A long series in few numbers: when there are too many, neighbours become their mean."""

    capacity = 16 * SPARKLINE_COLUMNS

    def __init__(self) -> None:
        self.values: list[float] = []
        self.stride = 1
        self._sum, self._n = 0.0, 0

    def add(self, value: float) -> None:
        """Takes one more number; NaN and infinity are left out."""
        if not math.isfinite(value):
            return
        self._sum, self._n = self._sum + value, self._n + 1
        if self._n < self.stride:
            return
        values = [*self.values, self._sum / self._n]
        self._sum, self._n = 0.0, 0
        if len(values) >= self.capacity:
            values = [(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=True)]
            self.stride *= 2
        self.values = values


@dataclass
class Status:
    """How a run stands. Training writes it, the view reads it; no lock is needed for that."""

    name: str
    """Of the run."""
    max_steps: int = 0
    tokens_per_step: int = 0
    first_step: int = 0
    """Where this process began."""
    started_at: float = 0.0
    """When it did, by time.monotonic."""
    step: int = 0
    """Optimizer steps taken."""
    stepped_at: float = 0.0
    """When the last of them ended."""
    losses: History = field(default_factory=History)
    """Training loss, nats per token."""
    loss: float = math.nan
    latest: dict[str, float] = field(default_factory=dict)
    """What was measured last, by its name in metrics.csv."""
    validated_step: int | None = None
    comparison: str = ""
    """val_bpb against the reference's."""
    evaluated_step: int | None = None
    evaluation: str = ""
    """The headline of the last evaluation."""
    is_shown: bool = False
    """Whether a view draws it."""
    activity: str = ""
    """What is done instead of training just now."""
    skipped_steps: int = 0
    loss_spikes: int = 0
    checkpoint: Callable[[], tuple[int | None, int | None, str]] = lambda: (None, None, "")
    """Gives the step of the newest complete checkpoint, that of the one being written, and why the
    last one failed."""

    def seconds_left(self, now: float) -> float:
        """Until the last step, at the pace of this process so far, interruptions included."""
        n_step = self.step - self.first_step
        if n_step == 0:
            return math.nan
        pace = (self.stepped_at - self.started_at) / n_step
        return max(0.0, (self.max_steps - self.step) * pace - (now - self.stepped_at))

    @property
    def tokens_per_s(self) -> float:
        """As last measured; before that, since the start."""
        since_start = (self.step - self.first_step) * self.tokens_per_step
        seconds = self.stepped_at - self.started_at
        mean = since_start / seconds if seconds > 0 and since_start else math.nan
        return self.latest.get("tokens_per_s", mean)
