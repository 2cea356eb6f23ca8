"""`bov fit` and `bov validate`: from a recipe to a Trainer, and from there to a run directory."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything

from bov_lightning.checkpoint.directory import TOKENIZER
from bov_lightning.checkpoint.reading import load_weights, read_weights
from bov_lightning.claims import Claim, describe
from bov_lightning.console import say
from bov_lightning.distributed import preemption
from bov_lightning.distributed.preemption import Preempted, received
from bov_lightning.distributed.processes import restarted
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.lookup import is_own, source_class
from bov_lightning.planning.cost import make_plan
from bov_lightning.planning.own_source import try_own_source
from bov_lightning.recipe.budget import accumulation
from bov_lightning.recipe.given import Given
from bov_lightning.recipe.overlays import read_yaml
from bov_lightning.recipe.sameness import fixed_difference, part_of
from bov_lightning.run.directory import Ended, RunDirectory, move_aside
from bov_lightning.run.loggers import MetricsCSV, TensorBoardEvents, never_end_a_run
from bov_lightning.run.own_code import refuse_other_code
from bov_lightning.run.reference import find_reference
from bov_lightning.run.status import Status
from bov_lightning.training.allocator import keep_freed_memory
from bov_lightning.training.callbacks.checkpointer import Checkpointer
from bov_lightning.training.callbacks.guard import LossGuard
from bov_lightning.training.callbacks.reporter import Reporter, reporter_of
from bov_lightning.training.callbacks.run_files import RunFiles
from bov_lightning.training.callbacks.watchdog import Watchdog
from bov_lightning.training.internals import (
    call_last,
    leave_signals_to_us,
    quiet_lightning,
    set_lengths,
)
from bov_lightning.training.lightning_cli import build_cli
from bov_lightning.training.module import BoVModule

LEFT_BEHIND = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE",
               "WANDB_RUN_ID", "WANDB_RESUME")  # fmt: skip
"""Variables that a run sets for itself."""


@contextmanager
def _own_process_group() -> Iterator[None]:
    """Leaves neither a process group nor its address behind for what this process does next."""
    before = dict(os.environ)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in LEFT_BEHIND:
            if name not in before:
                os.environ.pop(name, None)


@_own_process_group()
def fit(given: Given) -> None:
    """Trains the recipe, or continues the run of its name, and prints val_bpb at the end."""
    started = time.monotonic()
    quiet_lightning()
    recipe, run = given.recipe, RunDirectory(given.run)
    batch, config = recipe.batch, recipe.model.config
    try_own_source(config)
    figures = make_plan(config, given.budget, batch.tokens)
    # One device divides what any number of devices could: refuse before Lightning starts.
    accumulation(batch.tokens, batch.micro, config.sequence_len, 1)
    # A requeued job continues whatever its command line says: it would never end otherwise.
    resume = recipe.resume != "never" or restarted()
    metrics, holder = MetricsCSV(run), Holder(run, resume)
    own: list[Callback] = []

    def make_callbacks(config_yaml: str) -> list[Callback]:
        if resume and run.checkpoints():
            _check_same_run(run, config_yaml)
            if recipe.resume != "changed_code":
                refuse_other_code(run, config.value.source)
        own.extend(_callbacks(given, run, metrics, config_yaml, figures, resume, holder))
        return own

    cli = build_cli(given, [metrics, TensorBoardEvents(run)], make_callbacks)
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    if trainer.is_global_zero:
        _warn_of_export(config)
    n_micro = accumulation(batch.tokens, batch.micro, config.sequence_len, trainer.world_size)
    last_step = module.n_step
    if resume and (ended := _still_ended(run, cli.resolved_yaml)):
        last_step = ended.step
        if trainer.is_global_zero:
            say(f"{run} was ended at step {ended.step} of {module.n_step} by {ended.by}, and stays "
                "so until trainer.callbacks, trainer.max_time or model.budget change")  # fmt: skip
    set_lengths(trainer, n_micro, last_step, recipe.validation.every_steps)
    call_last(trainer, own)
    for logger in trainer.loggers:
        never_end_a_run(logger)
    trainer.strategy.on_start = holder.begin
    leave_signals_to_us(trainer)
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    seed_everything(recipe.seed, workers=True, verbose=False)
    reporter = reporter_of(trainer)
    try:
        with preemption.gentle_interrupt(lambda: reporter.status.started_at > 0):
            trainer.fit(module, datamodule=data)
        if not trainer.global_step and not trainer.should_stop:
            raise UserError("the data gave no batch to train on: see data and trainer")
        if reporter.validated_step != trainer.global_step:
            trainer.validate(module, datamodule=data, verbose=False)
            for logger in trainer.loggers if trainer.is_global_zero else []:
                logger.log_metrics({"val_bpb": reporter.latest["val_bpb"]}, trainer.global_step)
                logger.save()
    except Preempted:
        raise
    except SystemExit:
        # What Lightning makes of Ctrl-C.
        if trainer.interrupted and trainer.is_global_zero:
            say(f"interrupted: the same command continues {run}")
        raise KeyboardInterrupt from None
    finally:
        reporter.stop()
        holder.end()
    if trainer.is_global_zero:
        minutes = (time.monotonic() - started) / 60
        print(f"val_bpb {reporter.latest['val_bpb']:.4f}")
        early = f" of {module.n_step}, ended early" if trainer.global_step < module.n_step else ""
        print(f"run {run} (step {trainer.global_step}{early}, {minutes:.1f} min)")


def _warn_of_export(config: TransformerConfig) -> None:
    """Says before training what would be in the way after it."""
    source = source_class(config.value.source)
    if not is_own(source):
        return
    # It looks at the code of everything that an export holds, which takes seconds to import.
    from bov_lightning.interop.hf_source import check_exportable

    try:
        check_exportable(source)
    except UserError as error:
        say(f"warning: {error}")


class Holder:
    """Sees to it that one process alone trains a run; rank 0 speaks for all ranks."""

    def __init__(self, run: RunDirectory, resume: bool):
        """``resume``: whether to go on; otherwise what is there is moved aside."""
        self.run, self.resume = run, resume
        self.claim: Claim | None = None
        self._made: list[Path] = []

    def begin(self, ranks: Ranks) -> None:
        """Claims the run, before anything is prepared or written; all ranks call it.

        Raises:
            UserError: on all ranks, if somebody else trains it.
            Preempted: a signal came while it was waited for.
        """
        known = ranks.on_first(self._claim)
        # Weights & Biases, where a recipe asks for it, would begin a new run at every requeue.
        os.environ.setdefault("WANDB_RUN_ID", known)
        os.environ.setdefault("WANDB_RESUME", "allow")

    def _claim(self) -> str:
        """The name by which loggers know the run."""
        if self.claim is None:
            path = self.run.path
            if not self.resume and path.exists():
                say(f"moved the old run to {move_aside(path)}")
            self._made = [x for x in (path, *path.parents) if not x.exists()]
            try:
                self.claim = self.run.claim(stop=lambda: received() != 0)
            except UserError:
                if received():
                    raise Preempted(received()) from None
                raise
            self.claim.__enter__()
        return self.run.logger_id()

    def check(self) -> None:
        """Raises a `UserError` if the run is not ours any more."""
        if self.claim is None or self.claim.is_mine():
            return
        if (other := self.run.trainer()) is not None:
            raise UserError(f"{self.run} is trained by {describe(other)} now, who took it over")
        raise UserError(
            f"{self.run} was moved or deleted while it is trained: put it back to have it saved"
        )

    def end(self) -> None:
        """Gives the run up; a directory in which nothing was done is not left behind."""
        if self.claim is None:
            return
        self.claim.__exit__()
        for path in self._made:
            with suppress(OSError):
                path.rmdir()


def _still_ended(run: RunDirectory, config_yaml: str) -> Ended | None:
    """How the run was ended early; None where what ended it reads otherwise now: it goes on."""
    ended = run.ended()
    if ended is None or not run.config.is_file():
        return None
    stored, now = read_yaml(run.config), yaml.safe_load(config_yaml)
    keys = ("trainer.callbacks", "trainer.max_time", "model.budget")
    return ended if all(part_of(stored, key) == part_of(now, key) for key in keys) else None


def _callbacks(
    given: Given, run: RunDirectory, metrics: MetricsCSV, config_yaml: str, figures: dict,
    resume: bool, holder: Holder,
) -> list[Callback]:  # fmt: skip
    """The callbacks of a run, in the order in which they are told of each step.

    The order matters: Lightning calls them one after the other at every hook.
    """
    recipe = given.recipe
    checkpointer = Checkpointer(
        run, recipe.checkpoint, recipe.validation, resume, config_yaml, metrics, holder.check
    )
    status = Status(recipe.run.name, checkpoint=checkpointer.state)
    reference = recipe.run.reference and find_reference(recipe.run.reference, recipe.run.root)
    watchdog = Watchdog(recipe.guard.late_after_s)
    reporter = Reporter(status, reference, recipe.validation.tokens)
    callbacks = [
        watchdog,  # notes where this rank is before it waits for the others
        # config.yaml is there before the first checkpoint
        RunFiles(run, config_yaml, recipe.model.config.value.source, figures),
        LossGuard(recipe.guard),  # agrees on loss and signal, which the next two read
        reporter,  # a step that is saved has been logged
        checkpointer,  # may end the process, after everybody else has seen the step
    ]
    if recipe.evaluation.tasks:
        # lm-eval takes seconds to import.
        from evaluation.callback import Evaluator

        def should_stop() -> bool:
            watchdog.note("evaluation")
            return received() != 0

        def stop(trainer: Trainer, module: BoVModule) -> None:
            checkpointer.stop_if_told(trainer, module, trainer.strategy.agree_on_signal())

        # Last: what is evaluated has been saved.
        evaluator = Evaluator(
            run.path, recipe.evaluation, recipe.checkpoint.every_steps, should_stop, stop,
            status, reporter.leave_out,
        )  # fmt: skip
        callbacks.append(evaluator)
    return callbacks


def _check_same_run(run: RunDirectory, config_yaml: str) -> None:
    """Refuses to resume under settings that the run was not trained with."""
    if difference := fixed_difference(read_yaml(run.config), yaml.safe_load(config_yaml)):
        key, before, now = difference
        raise UserError(
            f"{run} was trained with {key} {before!r}, not {now!r}: use another run.name, or "
            "--resume never to start it afresh"
        )


@_own_process_group()
def validate(checkpoint: Path, given: Given) -> float:
    """Prints and returns the checkpoint's val_bpb on the recipe's held-out text."""
    quiet_lightning()
    cli = build_cli(given)
    module, data = cli.model, cli.datamodule
    module.configure_model()
    load_weights(module.model, read_weights(checkpoint), checkpoint)
    if (checkpoint / TOKENIZER).is_dir():
        from data_modules.tokenizer import same_tokenizer, tokenizer_hash

        data.prepare_data()
        if not same_tokenizer(checkpoint / TOKENIZER, data.tokenizer_directory):
            own = tokenizer_hash(checkpoint / TOKENIZER)
            theirs = tokenizer_hash(data.tokenizer_directory)
            raise UserError(
                f"{checkpoint} was trained with another tokenizer than that of the data "
                f"({own}, not {theirs}): use data.init_args.tokenizer.path {checkpoint / TOKENIZER}"
            )
    cli.trainer.validate(module, datamodule=data, verbose=False)
    val_bpb = float(cli.trainer.callback_metrics["val_bpb"])
    if cli.trainer.is_global_zero:
        print(f"val_bpb {val_bpb:.4f}")
    return val_bpb
