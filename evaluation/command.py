"""`bov evaluate`: benchmarks for a checkpoint, a run directory or a Hugging Face directory."""

import json
import os
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from bov_lightning.checkpoint.directory import CONFIG, find_checkpoint, is_complete
from bov_lightning.checkpoint.reading import key_problem
from bov_lightning.console import CONSOLE, say
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.errors import EvaluationInterruptedError, UserError
from bov_lightning.inference.loading import check_device, end_tokens, load
from bov_lightning.recipe.data_module import build_data
from bov_lightning.recipe.given import read_stored
from bov_lightning.run.directory import EVAL
from evaluation import heldout, report
from evaluation.backends import Backend, HuggingFaceBackend, TransformerBackend
from evaluation.results import HELDOUT, write_results
from evaluation.runner import Benchmarks, Runtime, download_data, load_tasks, run
from evaluation.watch import Watcher, read_step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_stopped: list[int] = []


def load_model(path: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, Backend, Any]:
    """Model, backend and tokenizer of whatever lies at ``path``.

    Raises:
        UserError: nothing there, unreadable, weights that are missing or unknown, or no tokenizer;
            also when a checkpoint is removed while it is read.
    """
    config = Path(path) / "config.json"
    try:
        kind = json.loads(config.read_text()).get("model_type") if config.is_file() else "bov"
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{config} cannot be read: {error}") from error
    if kind != "bov":
        model, tokenizer = _load_hugging_face(path, device, dtype)
        backend: Backend = HuggingFaceBackend(model)
    else:
        try:
            model, tokenizer = load(path, device=device, dtype=dtype)
        except FileNotFoundError as error:
            raise UserError(f"{path} was removed while it was read: {error}") from error
        if tokenizer is not None:
            backend = TransformerBackend(model, end_tokens=end_tokens(path, tokenizer))
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer, which benchmarks need: put one into it")
    return model, backend, tokenizer


def _load_hugging_face(path: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    # What it warns of in a table of many lines is an error of one line here.
    logging.set_verbosity_error()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # many kinds, from many formats
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"{path} cannot be loaded as a causal language model: {detail}") from error
    # Missing weights have been filled at random, which is said nowhere but here.
    if problem := key_problem(loading["missing_keys"], loading["unexpected_keys"]):
        raise UserError(f"the weights in {path} are not those of its config.json: {problem}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"{path} has no usable tokenizer: {detail}") from error
    return model.to(device).eval(), tokenizer


def run_of(path: Path) -> Path | None:
    """The run directory that a path is, or lies in."""
    if is_complete(path):
        above = path.absolute().parent.parent
        return above if path.absolute().parent.name == "checkpoints" else None
    return path if (path / "checkpoints").is_dir() else None


def _heldout_directory(path: Path, temporary: Path) -> Path:
    """The run's held-out tasks; made from its data where the run did not leave them."""
    own = run_of(path)
    if own is not None and (own / EVAL / HELDOUT / "continuation.jsonl").is_file():
        return own / EVAL / HELDOUT
    config = find_checkpoint(path) / CONFIG
    given = read_stored(config)
    if not given.plain.get("data"):
        raise UserError(f"{config} has no data section, which the heldout tasks are made from")
    data = build_data(given)
    data.prepare_data()
    data.setup("validate")
    heldout.write_from_data(temporary / HELDOUT, data)
    return temporary / HELDOUT


def _join_ranks(device: str) -> str:
    """Takes part in a job of several processes, if torchrun or SLURM started one; the device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
        if device == "cuda":
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


class _Bar:
    """Rows done, on a terminal."""

    def __init__(self, console: Console, label: str, is_zero: bool):
        self.progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(), console=console, transient=True,
            disable=not (console.is_terminal and is_zero),
        )  # fmt: skip
        self.task = self.progress.add_task(label, total=None)

    def update(self, done: int, total: int) -> None:
        self.progress.update(self.task, completed=done, total=total)


class Command:
    """One call of `bov evaluate`."""

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self._temporary = tempfile.TemporaryDirectory(
            prefix="bov-heldout-"
        )  # gone with the command
        check_device(options["device"])
        for name in ("max_per_task", "tokens_per_forward", "time_limit"):
            if options[name] is not None and options[name] <= 0:
                raise UserError(f"--{name.replace('_', '-')} is {options[name]}: more than 0")
        self.device = _join_ranks(options["device"])
        self.ranks = Ranks.of_job()
        tasks = tuple(dict.fromkeys(t for part in options["tasks"] for t in part.split(",") if t))
        self.benchmarks = Benchmarks(
            tasks=tasks, max_per_task=options["max_per_task"], data_dir=options["data_dir"],
            include_path=options["include_path"], time_limit=options["time_limit"],
        )  # fmt: skip

    def _say(self, line: str) -> None:
        if self.ranks.rank == 0:
            say(line)

    def _benchmarks(self, path: Path) -> Benchmarks:
        if not heldout.needs_heldout(self.benchmarks.tasks):
            return self.benchmarks
        directory = _heldout_directory(path, Path(self._temporary.name))
        return replace(self.benchmarks, heldout_dir=str(directory))

    def _load(self, path: str) -> tuple[nn.Module, Backend, Any]:
        return load_model(path, self.device, DTYPES[self.options["dtype"]])

    def _evaluate(self, path: str, loaded: dict | None = None) -> dict[str, Any]:
        benchmarks = self.ranks.together(lambda: self._benchmarks(Path(path)))
        # Names and data files are looked at before a model of many gigabytes is.
        tasks = loaded or self.ranks.together(lambda: load_tasks(benchmarks))
        model, backend, tokenizer = self.ranks.together(lambda: self._load(path))
        bar = _Bar(CONSOLE, Path(path).name, self.ranks.rank == 0)
        runtime = Runtime(
            budget=self.options["tokens_per_forward"], should_stop=lambda: bool(_stopped),
            progress=bar.update, ranks=self.ranks,
        )  # fmt: skip
        with bar.progress:
            return run(model, backend, tokenizer, benchmarks, runtime, tasks)

    def __call__(self) -> None:
        """Evaluates, prints and writes."""
        path, other = self.options["checkpoint"], self.options["compare"]
        if self.options["download"]:
            self.ranks.together(lambda: download_data(self.benchmarks, self._say))
        if self.options["watch"]:
            self._watch(Path(path))
            return
        self.ranks.together(lambda: self._check_paths(path, other))
        results = self._evaluate(path)
        compared = self._evaluate(other) if other else None
        if self.ranks.rank == 0:
            print(f"{path}")
            print(report.table(results))
            if compared is not None:
                print(f"\n{other}")
                print(report.table(compared))
                print()
                print(report.compare(results, compared, (path, other)))
        self.ranks.together(lambda: self._write(path, results))

    def _check_paths(self, *paths: str | None) -> None:
        for path in filter(None, paths):
            if not (Path(path) / "config.json").is_file():
                find_checkpoint(path)

    def _write(self, path: str, results: dict[str, Any]) -> None:
        if self.options["output"] and self.ranks.rank == 0:
            step = None
            if not (Path(path) / "config.json").is_file():
                step = read_step(find_checkpoint(path))
            written = write_results(Path(self.options["output"]), results, path, step)
            self._say(f"written to {written}")

    def _watch(self, path: Path) -> None:
        if self.ranks.size > 1:
            raise UserError("--watch runs in one process: start several watchers instead")
        if self.options["compare"] or self.options["output"]:
            raise UserError("--watch writes into the run: leave --compare and --output away")
        if is_complete(path):
            raise UserError(f"{path} is a checkpoint: --watch takes a run directory")
        if not heldout.needs_heldout(self.benchmarks.tasks):
            load_tasks(self.benchmarks)
        watcher = Watcher(
            path, self.benchmarks.settings, lambda found: self._evaluate(str(found)), self._say,
            should_stop=lambda: bool(_stopped), poll_s=self.options["poll_seconds"],
        )  # fmt: skip
        watcher.watch()


def evaluate_command(**options: Any) -> None:
    """`bov evaluate`, with the options that `bov_lightning.cli` parses.

    SIGTERM ends it between two batches, with exit code 143 and nothing half-written.
    """
    before = signal.signal(signal.SIGTERM, lambda number, frame: _stopped.append(number))
    try:
        Command(options)()
    except EvaluationInterruptedError as error:
        say(f"evaluation interrupted: {error}")
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        _stopped.clear()
        signal.signal(signal.SIGTERM, before)
        if dist.is_initialized() and "WORLD_SIZE" in os.environ:
            dist.destroy_process_group()
