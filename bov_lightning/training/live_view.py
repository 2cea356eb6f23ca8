"""The live view of a run: a few lines at the bottom of the terminal, drawn by a thread of its own.

Training only writes numbers into a `Status`. The thread looks at them now and then, seldom enough
to stay below a thousandth of the time, whatever a drawing costs on this machine.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bov_lightning.run.status import SPARKLINE_COLUMNS, Status

SHARE = 0.001
"""Of the time, at most spent on drawing."""
EVERY_S = 1.0
"""Seconds between two drawings, at least."""
MOST_COLUMNS = 110
LABEL_COLUMNS = 12
SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], columns: int = SPARKLINE_COLUMNS) -> str:
    """The series as so many characters at most, each the mean of its part, from least to most."""
    n = min(columns, len(values))
    ends = [len(values) * i // n for i in range(n + 1)] if n else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    if len(means) < 2 or max(means) == min(means):
        return ""
    scale = (len(SPARKS) - 1) / (max(means) - min(means))
    return "".join(SPARKS[round((mean - min(means)) * scale)] for mean in means)


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``; "-" where it is not known."""
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def number(value: float, form: str) -> str:
    """The formatted number; "-" where it is not known."""
    return format(value, form) if math.isfinite(value) else "-"


class RunView:
    """Draws a `Status` in whatever width there is: what does not fit a line goes to the next."""

    def __init__(self, status: Status):
        self.status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """A bar and a table; the last column stays free, where some terminals break lines."""
        width = min(options.max_width - 1, MOST_COLUMNS)
        status, now = self.status, time.monotonic()
        name = Text(status.name, style="bold")
        name_columns = min(max(name.cell_len, LABEL_COLUMNS - 1), width // 2)
        head = Table.grid(padding=(0, 1, 0, 0))
        head.add_column(width=name_columns, no_wrap=True, overflow="ellipsis")
        head.add_column(width=max(1, width - name_columns - 1))
        head.add_row(name, ProgressBar(total=max(1, status.max_steps), completed=status.step))
        yield head
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column(width=LABEL_COLUMNS - 1, style="dim", no_wrap=True)
        table.add_column(width=max(1, width - LABEL_COLUMNS), no_wrap=True, overflow="ellipsis")
        for label, items in self._rows(now, options.ascii_only):
            for line in flow([item for item in items if item], width - LABEL_COLUMNS):
                table.add_row(label, line)
                label = ""
        yield table

    def _rows(self, now: float, ascii_only: bool) -> Iterator[tuple[str, list[Text]]]:
        """Label and items of each line."""
        status = self.status
        latest, tokens = status.latest, status.step * status.tokens_per_step
        share = status.step / max(1, status.max_steps)
        yield (
            "step",
            [
                Text(f"{status.step:,} of {status.max_steps:,}", style="bold"),
                Text(f"{share:.1%}"),
                Text(f"ETA {duration(status.seconds_left(now))}", style="bold"),
                Text(f"{duration(now - status.started_at)} so far"),
                Text(f"{tokens:,} tokens"),
            ],
        )
        yield (
            "loss",
            [
                Text(number(status.loss, ".4f"), style="bold cyan"),
                Text("" if ascii_only else sparkline(status.losses.values), style="cyan"),
                Text(f"gradient norm {latest['grad_norm']:.3g}" if "grad_norm" in latest else ""),
                Text(f"learning rate {latest['lr_factor']:.0%}" if "lr_factor" in latest else ""),
            ],
        )
        yield (
            "speed",
            [
                Text(f"{number(status.tokens_per_s, ',.0f')} tokens/s"),
                Text(f"MFU {number(latest.get('mfu', math.nan), '.1%')}"),
            ],
        )
        if "val_bpb" in latest:
            at = "" if status.validated_step is None else f"step {status.validated_step:,}"
            found = Text(f"{latest['val_bpb']:.4f}", style="bold cyan")
            yield "val_bpb", [found, Text(at), Text(status.comparison)]
        yield "checkpoint", self._checkpoint()
        if status.evaluation:
            scores = [Text(score) for score in status.evaluation.split("  ")]
            yield "evaluation", [*scores, Text(f"step {status.evaluated_step:,}")]
        if status.skipped_steps or status.loss_spikes:
            yield (
                "guard",
                [
                    Text(f"skipped steps {status.skipped_steps:,}", style="yellow"),
                    Text(f"loss spikes {status.loss_spikes:,}", style="yellow"),
                ],
            )
        if status.activity:
            yield "now", [Text(status.activity, style="green")]

    def _checkpoint(self) -> list[Text]:
        complete, writing, failure = self.status.checkpoint()
        return [
            Text("none yet" if complete is None else f"step {complete:,}"),
            Text("" if writing is None else f"writing step {writing:,}", style="green"),
            Text(f"failed: {failure}" if failure else "", style="red"),
        ]


def flow(items: list[Text], width: int) -> Iterator[Text]:
    """The items on as few lines as they fit on; one that is too long for a line is cut there."""
    gap = "   "
    line = Text()
    for item in items:
        if line and line.cell_len + len(gap) + item.cell_len > width:
            yield line
            line = Text()
        line = Text.assemble(line, gap, item) if line else item
    yield line


class LiveView:
    """Keeps a `RunView` at the bottom of a terminal, below whatever else is printed."""

    def __init__(self, console: Console, status: Status):
        view = RunView(status)
        self._live = Live(
            console=console, auto_refresh=False, get_renderable=lambda: view,
            # What goes to a file is not for the screen.
            redirect_stdout=_is_terminal(console, stdout=True),
        )  # fmt: skip
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="live view", daemon=True)

    def start(self) -> None:
        """Draws from now on."""
        self._live.start()
        # rich hides it, and a process that is killed would leave the terminal without one.
        self._live.console.show_cursor(True)
        self._thread.start()

    def stop(self) -> None:
        """Draws for a last time, and leaves that in place."""
        self._stopped.set()
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._live.stop()

    def _draw(self) -> None:
        pause = 0.0
        while not self._stopped.wait(pause):
            started = time.thread_time()
            with contextlib.suppress(OSError):
                self._live.refresh()
            pause = max(EVERY_S, (time.thread_time() - started) / SHARE)


def can_be_live(console: Console) -> bool:
    """Whether the console is a terminal on which a view can be drawn again and again."""
    return console.is_interactive and _is_terminal(console)


def _is_terminal(console: Console, stdout: bool = False) -> bool:
    """Whether the console's file, or sys.stdout, is one; rich can be told otherwise."""
    file = sys.stdout if stdout else console.file
    return bool(file) and file.isatty()
