"""What a run shows: the live view in a real terminal, plain lines elsewhere, the reference."""

import contextlib
import csv
import fcntl
import json
import math
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import termios
import time
from io import StringIO
from pathlib import Path

import pytest
import yaml
from forks import Bov, bov
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bov_lightning.cli import main
from bov_lightning.recipe.overlays import merge
from bov_lightning.run.reference import Reference, find_reference
from bov_lightning.run.status import History, Status
from bov_lightning.training.live_view import LABEL_COLUMNS, SPARKS, RunView, can_be_live, sparkline

DATA = {"tokenizer": "t", "val_rows": "v", "source": "s"}


def make_run(folder: Path, points: dict, data: dict = DATA, validation: str = "null") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"data": data}))
    (folder / "config.yaml").write_text(f"validation: {{tokens: {validation}}}\n")
    lines = [f"{i},{tokens},{bpb}" for i, (tokens, bpb) in enumerate(points.items())]
    (folder / "metrics.csv").write_text("\n".join(["step,tokens,val_bpb", *lines, ""]))
    return folder


def test_the_reference_is_interpolated_at_the_same_tokens(tmp_path):
    run = make_run(tmp_path / "other", {100: 3.0, 300: 2.0, 200: ""})
    reference = Reference(run, DATA, None)
    for tokens, theirs in ((100, 3.0), (150, 2.75), (200, 2.5), (300, 2.0)):
        found = reference.compare(tokens, 2.25)
        assert found.difference == pytest.approx(2.25 - theirs)
    assert str(found) == "+0.2500 to other"
    for tokens, where in ((99, "its first is at 100"), (301, "it is at 300")):
        found = reference.compare(tokens, 2.25)
        assert found.difference is None
        assert where in found.reason
        assert not found.is_final


def test_a_reference_that_still_trains_is_read_anew(tmp_path):
    run = tmp_path / "other"
    reference = Reference(run, DATA, None)
    assert "cannot be read" in reference.compare(150, 2.0).reason
    make_run(run, {})
    assert reference.compare(150, 2.0).reason == "it has no val_bpb yet"
    make_run(run, {100: 3.0})
    with open(run / "metrics.csv", "a") as file:
        file.write("1,2000,1.")  # of 1.5: a row that is being written
    assert reference.compare(150, 2.0).difference is None
    with open(run / "metrics.csv", "a") as file:
        file.write("5\n")
    assert reference.compare(2000, 2.0).difference == pytest.approx(0.5)
    for name in ("metrics.csv", "run.json"):
        (run / name).write_bytes(b"\xff\x00,")
        assert "cannot be read" in reference.compare(150, 2.0).reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": DATA | {"tokenizer": "u"}}, "another tokenizer"),
        ({"data": DATA | {"val_rows": "w"}}, "another validation set"),
        ({"validation": "640"}, "validation.tokens is 640"),
    ],
)
def test_bits_per_byte_of_other_text_are_not_compared(tmp_path, change, reason):
    run = make_run(tmp_path / "other", {100: 3.0, 300: 2.0}, **change)
    found = Reference(run, DATA, None).compare(200, 2.0)
    assert found.difference is None
    assert found.is_final
    assert reason in found.reason


def test_a_reference_is_a_name_or_a_path(workplace):
    make_run(workplace / "runs" / "a", {})
    make_run(workplace / "elsewhere" / "b", {})
    assert find_reference("a", "runs") == Path("runs/a")
    assert find_reference("elsewhere/b", "runs") == Path("elsewhere/b")
    assert find_reference("not-yet", "runs") == Path("runs/not-yet")


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=2000))
def test_a_history_stays_short_and_keeps_the_mean(values):
    history = History()
    for value in values:
        history.add(value)
    finite = [value for value in values if math.isfinite(value)]
    assert len(history.values) < History.capacity
    kept = finite[: len(history.values) * history.stride]
    assert len(finite) - len(kept) < history.stride
    expected = math.fsum(kept) / max(1, len(kept))
    found = math.fsum(history.values) / max(1, len(history.values))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6 * max(map(abs, kept), default=1))


@given(st.lists(st.integers(0, 1000), max_size=300), st.integers(2, 40))
def test_a_sparkline_runs_from_the_least_to_the_most(values, columns):
    line = sparkline([float(value) for value in values], columns)
    assert len(line) <= columns
    if line:
        assert set(line) <= set(SPARKS)
        assert SPARKS[0] in line
        assert SPARKS[-1] in line
    if len(set(values)) > 1 and len(values) <= columns:
        assert line[values.index(max(values))] == SPARKS[-1]
        assert line[values.index(min(values))] == SPARKS[0]


def example() -> Status:
    status = Status("a-run-with-quite-a-long-name-in-runs", 5000, 524_288, 100)
    status.started_at = time.monotonic() - 1000
    status.step, status.stepped_at, status.loss = 1100, status.started_at + 1000, 3.4567
    for i in range(1000):
        status.losses.add(3 + 5 / (i + 1))
    status.latest = {
        "val_bpb": 1.2345, "tokens_per_s": 123456.0, "mfu": 0.412, "grad_norm": 0.4321,
        "lr_factor": 0.85,
    }  # fmt: skip
    status.validated_step, status.comparison = 1000, "-0.0123 to standard"
    status.evaluated_step, status.evaluation = 1000, "core_paper 0.0756  heldout 0.1234"
    status.skipped_steps, status.loss_spikes = 2, 1
    status.checkpoint = lambda: (1000, 1100, "no space left on device")
    status.activity = "validating: batch 3 of 40"
    return status


WORDS = [
    "1,100 of 5,000", "22.0%", "ETA 1:05:00", "3.4567", "gradient norm 0.432", "MFU 41.2%",
    "learning rate 85%", "123,456 tokens/s", "1.2345", "-0.0123 to standard", "step 1,000",
    "writing step 1,100", "core_paper 0.0756", "heldout 0.1234", "skipped steps 2",
    "loss spikes 1", "validating: batch 3 of 40", "failed: no space",
]  # fmt: skip


def drawn(status: Status, width: int, encoding: str = "utf-8") -> list[str]:
    file = type("File", (StringIO,), {"encoding": encoding})()
    Console(file=file, width=width, color_system=None).print(RunView(status))
    return file.getvalue().splitlines()


@given(st.integers(8, 250))
def test_the_view_fits_every_width(width):
    lines = drawn(example(), width)
    assert max(map(len, lines)) <= width
    if width >= 40:
        text = "\n".join(lines)
        for word in WORDS:
            assert word in text, (word, text)
    assert len(lines) <= 40


def test_the_view_of_a_run_that_just_starts():
    text = "\n".join(drawn(Status("run", max_steps=10), 80))
    for word in ("0 of 10", "ETA -", "- tokens/s", "MFU -", "none yet"):
        assert word in text
    for word in ("val_bpb", "evaluation", "guard", "nan"):
        assert word not in text


def test_the_view_without_unicode():
    assert "\n".join(drawn(example(), 80, "ascii")).isascii()


def test_only_terminals_are_live(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes everything for a terminal then
    assert not can_be_live(Console(file=StringIO()))


def metrics(run: str) -> list[dict]:
    with open(Path("runs") / run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_lines_say_the_difference_to_the_reference(tiny_recipe, trained, capsys):
    """The same recipe with another seed; the same numbers from both runs' files."""
    shutil.copytree(trained, "runs/first")
    options = ["--seed", "1", "--run.name", "second", "--run.reference", "first"]
    assert main(["fit", "--config", str(tiny_recipe), *options]) == 0
    error = capsys.readouterr().err
    bpb = [{r["step"]: r.get("val_bpb") for r in metrics(name)} for name in ("first", "second")]
    difference = float(bpb[1]["6"]) - float(bpb[0]["6"])
    assert difference != 0
    assert f"val_bpb {float(bpb[1]['6']):.4f} ({difference:+.4f} to first)" in error
    assert "\x1b" not in error

    options = ["--run.name", "third", "--run.reference", "first", "--validation.tokens", "320"]
    assert main(["fit", "--config", str(tiny_recipe), *options]) == 0
    error = capsys.readouterr().err
    assert error.count("warning: run.reference runs/first: its validation.tokens is 640") == 1
    assert " to first" not in error


def logger(name: str, **arguments) -> dict:
    return {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": arguments}


def with_loggers(tiny_settings: dict, *loggers: dict) -> str:
    settings = merge(tiny_settings, {"trainer": {"logger": list(loggers), "log_every_n_steps": 2}})
    Path("logged.yaml").write_text(yaml.safe_dump(settings))
    return "logged.yaml"


@pytest.mark.slow
def test_lightnings_loggers_get_what_metrics_csv_gets(tiny_settings, workplace):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [logger("CSVLogger", save_dir="csv"), logger("TensorBoardLogger", save_dir="tb")]
    assert main(["fit", "--config", with_loggers(tiny_settings, *loggers)]) == 0
    own = metrics("tiny")
    assert [row["step"] for row in own] == ["2", "3", "4", "6", "8"]
    (path,) = Path("csv").rglob("metrics.csv")
    with open(path, newline="") as file:
        theirs = list(csv.DictReader(file))
    (folder,) = {path.parent for path in Path("tb").rglob("events.out.*")}
    events = EventAccumulator(str(folder)).Reload()
    for name in ("train_loss", "val_bpb", "tokens"):
        expected = {int(row["step"]): float(row[name]) for row in own if row[name]}
        assert {int(row["step"]): float(row[name]) for row in theirs if row[name]} == expected
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == {step: pytest.approx(value) for step, value in expected.items()}, name
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["batch"]["tokens"] == 256


@pytest.mark.slow
def test_weights_and_biases_works_offline(tiny_settings, workplace, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(workplace))
    offline = logger("WandbLogger", project="bov", offline=True, save_dir="wb")
    # Its file is whole when the process has ended.
    bov("fit", "--config", with_loggers(tiny_settings, offline), check=True)
    own = {row["step"]: row for row in metrics("tiny")}
    (path,) = Path("wb").rglob("*.wandb")
    data = path.read_bytes()
    for step in ("2", "6", "8"):
        assert own[step]["train_loss"].encode() in data
    for step in ("3", "6", "8"):
        assert own[step]["val_bpb"].encode() in data


class Terminal:
    """A process in a terminal, and what is on its screen."""

    def __init__(self, columns: int, lines: int, *arguments: str):
        pyte = pytest.importorskip("pyte")
        self.screen = pyte.Screen(columns, lines)
        self.stream = pyte.ByteStream(self.screen)
        self.own, theirs = pty.openpty()
        self.resize(columns, lines)
        # What would count for more than the terminal's own size and kind.
        told = ("FORCE_COLOR", "COLUMNS", "LINES")
        environment = {name: os.environ[name] for name in os.environ if name not in told}
        environment["TERM"] = "xterm-256color"
        self.process = Bov(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.own, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def read(self, until: str | None = None, seconds: float = 500) -> None:
        """Follows the output until there is such a text on the screen, or to its end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if select.select([self.own], [], [], 0.5)[0]:
                try:
                    data = os.read(self.own, 65536)
                except OSError:  # Linux's end of file
                    data = b""
                if not data:
                    break
                self.stream.feed(data)
            if until is not None and until in self.text:
                return
        assert until is None, f"{until} did not appear:\n{self.text}"

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exception) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.own)


def shown(text: str, label: str) -> str:
    """The line of the view with such a label; there is one view on the screen."""
    (line,) = [line for line in text.splitlines() if line.startswith(label.ljust(LABEL_COLUMNS))]
    return line.removeprefix(label).strip()


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, 120])
def test_a_run_in_a_terminal(tiny_recipe, trained, columns):
    shutil.copytree(trained, "runs/first")
    arguments = ["fit", "--config", str(tiny_recipe), "--run.reference", "first", "--seed", "1"]
    with Terminal(columns, 40, *arguments, "--evaluation.tasks", "[heldout]") as terminal:
        terminal.read()
        assert terminal.process.wait(60) == 0
    text = terminal.text
    rows = metrics("tiny")
    assert shown(text, "step").startswith("8 of 8   100.0%   ETA 0:00")
    assert shown(text, "loss").startswith(f"{float(rows[-1]['train_loss']):.4f}")
    assert shown(text, "checkpoint") == "step 8"
    theirs = float(metrics("first")[-1]["val_bpb"])
    own = float(rows[-1]["val_bpb"])
    assert shown(text, "val_bpb") == f"{own:.4f}   step 8   {own - theirs:+.4f} to first"
    assert "heldout_last_token" in shown(text, "evaluation")
    # The result follows the view.
    assert text.index("evaluation ") < text.index(f"val_bpb {own:.4f}\n") < text.index("run runs/")
    assert not terminal.screen.cursor.hidden


LONG = ["--model.budget", "{steps: 100000}", "--checkpoint.every_steps", "100000",
        "--validation.every_steps", "100000", "--trainer.log_every_n_steps", "5"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, 130, "interrupted: the same command continues"),
        (signal.SIGTERM, 143, "(SIGTERM): the same command continues"),
        (signal.SIGKILL, -9, ""),
    ],
)
def test_signals_leave_the_terminal_usable(tiny_recipe, number, code, words):
    with Terminal(100, 30, "fit", "--config", str(tiny_recipe), *LONG) as terminal:
        before = termios.tcgetattr(terminal.own)
        terminal.read(until="learning rate")
        terminal.resize(45, 30)
        found = None
        while found is None:
            # Python may be where it swallows an interrupt, as in a callback of the collector.
            terminal.process.send_signal(number)
            terminal.read(seconds=60)
            with contextlib.suppress(subprocess.TimeoutExpired):
                found = terminal.process.wait(30)
        assert found == code
        assert termios.tcgetattr(terminal.own) == before
    assert not terminal.screen.cursor.hidden
    assert words in terminal.text.replace("\n", "")
