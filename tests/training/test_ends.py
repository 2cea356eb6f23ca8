"""However a run ends, its newest checkpoint is that of its last step, and all agree on it."""

import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from forks import Bov, bov
from processes import BovOnRanks
from runs import assert_same_end, final_state, fit, metrics, newest, wait_for

from bov_lightning.checkpoint.directory import complete_checkpoints
from bov_lightning.cli import main
from bov_lightning.report.reading import read_runs
from bov_lightning.run.directory import RunDirectory
from evaluation.watch import last_step

pytestmark = pytest.mark.slow

RUN = Path("runs/tiny")

CALLBACKS = '''
import errno, os
from pathlib import Path
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger


class Ender(Callback):
    """Does something at the n-th call of a hook."""

    def __init__(self, hook: str, n: int, what: str):
        self.n, self.what, self.taken = n, what, 0
        setattr(self, hook, self.called)

    def called(self, trainer, *arguments):
        self.n -= 1
        if self.n == 0 and self.what == "stop":
            trainer.should_stop = True
        elif self.n == 0:
            raise {"raise": RuntimeError, "interrupt": KeyboardInterrupt}[self.what]("as told")


class Mover(Callback):
    """Takes the run directory away after one step, and puts it back after another."""

    def __init__(self, away: int, back: int):
        self.away, self.back = away, back

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == self.away and Path("runs/tiny").exists():
            Path("runs/tiny").rename("runs/elsewhere")
        if trainer.global_step == self.back and Path("runs/elsewhere").exists():
            Path("runs/elsewhere").rename("runs/tiny")


class Remover(Callback):
    """Deletes a file after a step."""

    def __init__(self, path: str, step: int):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == self.step:
            Path(self.path).unlink(missing_ok=True)


class Filler(Callback):
    """Fills the disk of a file after a step."""

    def __init__(self, path: str, step: int):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == self.step and not Path(self.path).exists():
            try:
                with open(self.path, "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            except OSError:
                pass


class FullLogger(Logger):
    """Its disk is always full."""

    name = version = "full"

    def log_hyperparams(self, *arguments, **more):
        self.fail()

    def log_metrics(self, *arguments, **more):
        self.fail()

    def save(self):
        self.fail()

    def fail(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
'''


@pytest.fixture
def endings(tiny_recipe, workplace, monkeypatch):
    """Writes an overlay with callbacks, and gives `bov fit`'s arguments with it."""
    (workplace / "endings.py").write_text(CALLBACKS)
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.delitem(sys.modules, "endings", raising=False)

    def command(*callbacks: tuple[str, dict], **trainer) -> list[str]:
        listed = [{"class_path": name, "init_args": given} for name, given in callbacks]
        overlay = {"trainer": {"callbacks": listed, **trainer}}
        Path("overlay.yaml").write_text(yaml.safe_dump(overlay))
        configs = ["--config", str(tiny_recipe), "--config", "overlay.yaml"]
        return ["fit", *configs, "--run.name", "tiny"]

    return command


def assert_same_tensors(first: Path, second: Path) -> None:
    """Weights and optimizer state; callbacks may have counted other things."""
    for tensors, others in zip(final_state(first), final_state(second), strict=True):
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name


@pytest.mark.slow
def test_an_early_stop_is_an_end(endings, trained, tiny_recipe, capsys):
    """Its step is saved, and all know that the run is over; other callbacks let it go on."""
    stopper = ("lightning.pytorch.callbacks.EarlyStopping",
               {"monitor": "val_bpb", "mode": "max", "patience": 1})  # fmt: skip
    command = [*endings(stopper), "--checkpoint.every_steps", "5"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert newest(RUN) == 6
    assert "ended early by EarlyStopping" in err
    assert "step 6 of 8, ended early" in out
    assert f"val_bpb {float(metrics(RUN)[6]['val_bpb']):.4f}" in out
    assert last_step(RUN) == RunDirectory(RUN).ended().step == 6
    (run,), unusable = read_runs([RUN])
    assert not unusable
    assert run.unfinished is None
    assert "step 6 of 8" in run.notes[-1]

    before = (RUN / "metrics.csv").read_bytes()
    assert main(command) == 0
    assert "stays so" in capsys.readouterr().err
    assert newest(RUN) == 6
    assert (RUN / "metrics.csv").read_bytes() == before

    assert main(["fit", "--config", str(tiny_recipe)]) == 0
    assert newest(RUN) == 8
    assert RunDirectory(RUN).ended() is None
    assert_same_tensors(trained, RUN)


@pytest.mark.slow
def test_a_sweep_takes_a_run_that_was_ended_early_for_finished(endings, tiny_recipe, capsys):
    ender = ("endings.Ender", {"hook": "on_train_batch_end", "n": 6, "what": "stop"})
    overlay = endings(ender)[3:5]
    name = ["--run.name", "tiny-standard-seed0"]
    fit(tiny_recipe, *overlay, "--config", "values/standard", *name)
    capsys.readouterr()
    sweep = ["sweep", "--config", str(tiny_recipe), *overlay, "--values", "standard", "--dry-run"]
    flops = yaml.safe_load(Path("runs/tiny-standard-seed0/config.yaml").read_text())
    assert flops["model"]["budget"]["steps"] == 8
    assert main(sweep) == 0
    assert "ended at step 3" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "n", "what"),
    [
        ("on_train_batch_start", 6, "raise"), ("on_train_batch_start", 6, "stop"),
        ("on_train_batch_end", 5, "interrupt"), ("on_train_batch_end", 6, "raise"),
        ("on_train_batch_end", 6, "stop"), ("on_after_backward", 7, "interrupt"),
        ("on_validation_end", 1, "raise"), ("on_validation_batch_start", 2, "interrupt"),
        ("on_validation_batch_start", 2, "stop"),
    ],
)  # fmt: skip
def test_whatever_a_callback_does_the_last_step_is_saved(
    endings, tiny_recipe, trained, hook, n, what, capsys
):
    """Two micro-batches make a step; the run then goes on as if nothing had been."""
    command = endings(("endings.Ender", {"hook": hook, "n": n, "what": what}))
    command += ["--checkpoint.every_steps", "100"]
    if what == "raise":
        with pytest.raises(RuntimeError, match="as told"):
            main(command)
    else:
        assert main(command) == (130 if what == "interrupt" else 0)
    steps = (n if hook == "on_train_batch_end" else n - 1) // 2
    if what == "stop":
        steps = -(-n // 2)  # the step in which it was said
    if "validation" in hook:
        steps = 3
    assert newest(RUN) == steps
    assert main(["fit", "--config", str(tiny_recipe)]) == 0
    assert_same_tensors(trained, RUN)


@pytest.mark.slow
def test_time_that_is_up_ends_a_run_between_two_steps(endings, tiny_recipe, trained, capsys):
    assert main(endings(max_time="00:00:00:00")) == 0
    assert newest(RUN) <= 1
    fit(tiny_recipe, "--batch.micro", "1", "--run.name", "other")
    assert main(["fit", "--config", str(tiny_recipe)]) == 0
    assert_same_tensors(trained, RUN)


def test_data_that_comes_to_its_end_is_said_and_saved(endings, tiny_recipe, capsys, monkeypatch):
    from data_modules.packed import TrainingRows

    monkeypatch.setattr(TrainingRows, "__len__", lambda self: 10)
    monkeypatch.setattr("data_modules.packed.TrainingRows.__init__", _short(TrainingRows.__init__))
    assert main(["fit", "--config", str(tiny_recipe), "--checkpoint.every_steps", "100"]) == 2
    assert "the data came to its end at step 5 of 8" in capsys.readouterr().err
    assert newest(RUN) == 5


def _short(make):
    def init(self, rows, micro, n_batch, *arguments):
        make(self, rows, micro, min(n_batch, 10), *arguments)

    return init


LONG = ("--model.budget.steps", "5000", "--checkpoint.every_steps", "1000",
        "--trainer.log_every_n_steps", "1")  # fmt: skip


def trains(process) -> None:
    wait_for(lambda: len(rows()) > 3, process)


def rows() -> list[str]:
    path = RUN / "metrics.csv"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "code"),
    [([signal.SIGHUP], 143), ([signal.SIGTERM], 143), ([signal.SIGINT], 130),
     ([signal.SIGINT, signal.SIGINT], 130), ([signal.SIGHUP, signal.SIGTERM], 143)],
)  # fmt: skip
def test_signals_save_the_last_step(tiny_recipe, numbers, code):
    with Bov("fit", "--config", tiny_recipe, *LONG) as process:
        trains(process)
        for number in numbers:
            process.send_signal(number)
        _, error = process.communicate()
    assert process.returncode == code, error
    assert "Traceback" not in error
    last = max(metrics(RUN))
    # A second Ctrl-C does not wait for a save, unless both came as one.
    assert newest(RUN) in ((last, 0) if numbers == [signal.SIGINT] * 2 else (last,))
    assert "the same command continues runs/tiny" in error
    assert not list(RUN.glob(".training*"))


@pytest.mark.slow
def test_a_terminal_that_is_closed_saves_the_last_step(tiny_recipe):
    """A real one: what is printed from then on goes nowhere, and must do no harm."""
    command = [sys.executable, "-m", "bov_lightning.cli", "fit", "--config", str(tiny_recipe)]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started pytest may ignore it
        os.execv(sys.executable, [*command, *LONG])
    try:
        while len(rows()) <= 3:
            os.read(terminal, 4096)
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    assert newest(RUN) == max(metrics(RUN))


@pytest.mark.slow
def test_nohup_is_respected(tiny_recipe):
    command = [sys.executable, "-m", "bov_lightning.cli", "fit", "--config", str(tiny_recipe),
               "--model.budget.steps", "30", "--trainer.log_every_n_steps", "1"]  # fmt: skip
    with subprocess.Popen(["nohup", *command], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as process:  # fmt: skip
        trains(process)
        process.send_signal(signal.SIGHUP)
        _, error = process.communicate()
    assert process.returncode == 0, error
    assert newest(RUN) == 30


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_leaves_one_curve(tiny_recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Bov("fit", "--config", tiny_recipe, *LONG) as process:
        trains(process)
        process.kill()
        process.wait()
    assert not complete_checkpoints(RUN)
    # As if the clock had been set back since.
    (events,) = RUN.glob("events.out.tfevents.*")
    stamp = events.name.split(".")[3]
    events.rename(events.with_name(events.name.replace(stamp, str(int(stamp) + 10_000))))
    fit(tiny_recipe, "--trainer.log_every_n_steps", "1")
    shown = EventAccumulator(str(RUN)).Reload().Scalars("train_loss")
    assert [event.step for event in shown] == list(range(1, 9))
    assert sorted(metrics(RUN)) == list(range(1, 9))


def test_a_logger_never_ends_a_run(endings, trained, capsys):
    """One of the user's whose disk is full, and metrics.csv, which makes up for it later."""
    RUN.mkdir(parents=True)
    partial = RUN / ".metrics.csv.partial"
    partial.symlink_to("/dev/full")
    remover = ("endings.Remover", {"path": str(partial), "step": 5})
    assert main(endings(remover, logger=[{"class_path": "endings.FullLogger"}])) == 0
    error = capsys.readouterr().err
    for name in ("FullLogger", "MetricsCSV"):
        assert error.count(f"{name} cannot log") == 1
    assert "No space left on device" in error
    assert_same_tensors(trained, RUN)
    assert metrics(RUN).keys() == metrics(trained).keys()
    for step, row in metrics(trained).items():
        assert metrics(RUN)[step]["val_bpb"] == row["val_bpb"]


def test_tensorboard_goes_on_when_there_is_room_again(workplace, monkeypatch, capsys):
    """A limit on the size of files stands for a full disk: the same thread meets the same error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from bov_lightning.run.loggers import TensorBoardEvents, never_end_a_run

    logger, limits = TensorBoardEvents(RunDirectory(".")), resource.getrlimit(resource.RLIMIT_FSIZE)
    never_end_a_run(logger)
    for step in range(1, 10):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            logger._retry_at = 0.0
        logger.log_metrics({"x": step}, step)
        logger.save()
    # Files of one second, which retries have only here, are read by a number in their names: 10, 9.
    shown = sorted(event.step for event in EventAccumulator(".").Reload().Scalars("x"))
    assert shown == [1, 2, 3, 7, 8, 9]
    error = capsys.readouterr().err
    assert error.count("TensorBoardEvents cannot log") == 1
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_full_disk_of_the_logs_is_only_said(endings, trained, workplace):
    """A real file system that is full, with the checkpoints on another one."""
    disk, run = workplace / "disk", workplace / "disk" / "tiny"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        run.mkdir()
        (workplace / "room").mkdir()
        (run / "checkpoints").symlink_to(workplace / "room")
        filler = ("endings.Filler", {"path": str(disk / "filler"), "step": 2})
        found = bov(*endings(filler, log_every_n_steps=1), "--run.root", disk)
        assert found.returncode == 0, found.stderr
        assert "Traceback" not in found.stderr
        assert found.stderr.count("MetricsCSV cannot log") == 1
        assert_same_tensors(trained, run)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_that_is_moved_while_it_is_trained_can_be_put_back(endings, trained, capsys):
    command = endings(("endings.Mover", {"away": 3, "back": 6}))
    evaluation = ["--evaluation.tasks", "[heldout]", "--evaluation.max_per_task", "2",
                  "--evaluation.every_steps", "4"]  # fmt: skip
    assert main([*command, *evaluation]) == 0
    error = capsys.readouterr().err
    assert "step-00000004 cannot be" not in error
    assert "put it back to have it saved" in error
    assert "step 4 is not evaluated: runs/tiny was moved or deleted" in error
    assert [path.name for path in Path("runs/tiny/eval").glob("step-*")] == ["step-00000008"]
    assert newest(RUN) == 8
    assert [path.name for path in Path("runs").iterdir()] == ["tiny"]
    assert_same_tensors(trained, RUN)
    assert metrics(RUN).keys() == metrics(trained).keys()


@pytest.mark.slow
def test_two_fits_of_one_run(tiny_recipe, trained):
    """The second says who trains it; one that was killed is in nobody's way."""
    command = ["fit", "--config", tiny_recipe]
    with Bov(*command, *LONG) as first:
        trains(first)
        for options in ([], ["--resume", "never"]):
            second = bov(*command, *LONG, *options)
            assert second.returncode == 2
            assert f"is being trained by process {first.pid} on " in second.stderr
        Path("alias").symlink_to("runs")
        again = bov(*command, *LONG, "--run.root", "alias")
        assert again.returncode == 2
        assert first.poll() is None
        first.kill()
        first.wait()
    assert list(RUN.glob(".training*"))
    fit(tiny_recipe)
    assert_same_end(trained, RUN)
    assert not list(RUN.glob(".training*"))


@pytest.mark.distributed
def test_ranks_of_one_job_hold_one_run(tiny_recipe):
    command = ["fit", "--config", str(tiny_recipe), *LONG]
    with BovOnRanks(2, *command) as first:
        trains(first)
        with BovOnRanks(2, *command) as second:
            assert second.wait() == [2, 2], second.printed
            assert second.printed.count(f"is being trained by process {first.ranks[0].pid}") == 2
        first.ranks[1].send_signal(signal.SIGINT)
        assert first.wait(60) == [130, 130], first.printed
    assert newest(RUN) == max(metrics(RUN))


def test_all_markers_removed_is_refused(tiny_recipe, tiny_run, capsys):
    for path in complete_checkpoints(tiny_run):
        (path / "checkpoint.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()}
    assert main(["fit", "--config", str(tiny_recipe)]) == 2
    assert "--resume never" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in before if "checkpoints" in str(p)} == {
        p: t for p, t in before.items() if "checkpoints" in str(p)
    }


def test_checkpoints_under_other_names_are_not_trained_over(tiny_recipe, tiny_run, capsys):
    *others, last = complete_checkpoints(tiny_run)
    for path in others:
        shutil.rmtree(path)
    last.rename(last.with_name("step-00000008-backup"))
    assert main(["fit", "--config", str(tiny_recipe)]) == 2
    assert "step-00000008-backup is no name of one" in capsys.readouterr().err
    last.with_name("step-00000008-backup").rename(last.with_name("step-00000009"))
    assert main(["fit", "--config", str(tiny_recipe)]) == 2
    assert "it holds step 8: it was renamed" in capsys.readouterr().err


def test_a_budget_that_is_spent_already_is_refused(tiny_recipe, tiny_run, capsys):
    assert main(["fit", "--config", str(tiny_recipe), "--model.budget.steps", "5"]) == 2
    assert "has trained 8 steps, but the budget pays for 5" in capsys.readouterr().err


def test_an_empty_metrics_file_is_no_obstacle(tiny_recipe, tiny_run, capsys):
    shutil.rmtree(complete_checkpoints(tiny_run)[-1])
    (tiny_run / "metrics.csv").write_bytes(b"")
    fit(tiny_recipe)
    assert set(metrics(tiny_run)) == {6, 8}  # the validation at 6 is made up for


BAD_ROW = '{"text": 5}\n'


@pytest.mark.slow
def test_the_advice_about_a_bad_row_can_be_followed(tiny_settings, trained, workplace, capsys):
    """A stream meets it after some steps; those stay, and the run goes on without the row."""
    source = json.loads(json.dumps(tiny_settings["data"]["init_args"]["source"]))
    (text,) = source["init_args"]["train"]
    lines = Path(text).read_text().splitlines(keepends=True)
    Path("bad.jsonl").write_text("".join([*lines[: len(lines) // 20], BAD_ROW, *lines]))
    source["init_args"]["train"] = ["bad.jsonl"]
    settings = json.loads(json.dumps(tiny_settings))
    settings["data"] = {
        "class_path": "data_modules.StreamingDataModule",
        "init_args": {
            "directory": "stream", "source": source, "n_lane": 1, "n_worker": 0,
            "packing": {"buffer": 4}, "tokenizer": {"path": str(_tokenizer(tiny_settings))},
        },
    }  # fmt: skip
    Path("tiny.yaml").write_text(yaml.safe_dump(settings))
    command = ["fit", "--config", "tiny.yaml", "--model.budget.steps", "60",
               "--checkpoint.every_steps", "1000", "--trainer.log_every_n_steps", "1"]  # fmt: skip
    assert main(command) == 2
    assert "on_error: skip leaves such rows out" in capsys.readouterr().err
    saved = newest(RUN)
    assert saved == max(metrics(RUN)) > 0
    followed = ["--data.init_args.on_error", "skip", "--data.init_args.n_worker", "1"]
    assert main([*command, *followed]) == 0
    assert f"from step {saved} " in capsys.readouterr().err
    assert main([*command, *followed, "--run.name", "whole"]) == 0
    assert_same_tensors(Path("runs/whole"), RUN)


def _tokenizer(settings: dict) -> Path:
    return Path(settings["data"]["init_args"]["directory"]) / "tokenizer"
