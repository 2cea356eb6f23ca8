"""`bov fit` and `bov validate`: from a recipe to a LightningCLI, a Trainer and a run directory."""

import copy
import inspect
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI

from bov_lightning.checkpoint.directory import complete_checkpoints, read_weights
from bov_lightning.console import say
from bov_lightning.distributed.preemption import Preempted, received
from bov_lightning.distributed.processes import processes, restarted
from bov_lightning.distributed.strategy import choose_strategy
from bov_lightning.errors import UserError
from bov_lightning.recipe.budget import accumulation, make_plan
from bov_lightning.recipe.sections import (
    FIXED_BY_RUN,
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    GuardConfig,
    Recipe,
    RunConfig,
    ValidationConfig,
    first_difference,
    one_line,
    part_of,
    plain,
    read_yaml,
    unknown_key,
)
from bov_lightning.run.directory import Checkpointer, RunFiles, logger_run_id, move_aside
from bov_lightning.run.loggers import MetricsCSV, Reporter, TensorBoardEvents
from bov_lightning.run.reference import find_reference
from bov_lightning.training.allocator import keep_freed_memory
from bov_lightning.training.callbacks.guard import Control
from bov_lightning.training.callbacks.watchdog import Watchdog
from bov_lightning.training.live_view import Status
from bov_lightning.training.module import BoVModule

DERIVED = {
    "max_steps": "model.budget",
    "min_steps": "model.budget",
    "max_epochs": "model.budget",
    "min_epochs": "model.budget",
    "accumulate_grad_batches": "batch",
    "val_check_interval": "validation.every_steps",
    "check_val_every_n_epoch": "validation.every_steps",
    "limit_val_batches": "validation.tokens",
    "default_root_dir": "run",
    "enable_checkpointing": "checkpoint",
    "enable_progress_bar": "nothing: bov shows its own",
}
"""Arguments of the Trainer that other sections decide."""


class RecipeCLI(LightningCLI):
    """Builds DataModule, module and Trainer from a merged recipe."""

    def __init__(self, settings: dict, trainer_arguments: dict[str, Any]):
        """
        Args:
            settings: the merged recipe as plain data.
            trainer_arguments: what the other sections decide about the Trainer.
        """
        self.trainer_arguments = trainer_arguments
        super().__init__(
            BoVModule,
            LightningDataModule,
            subclass_mode_data=True,
            seed_everything_default=False,
            save_config_callback=None,
            run=False,
            # A copy: jsonargparse turns parts of what it is given into its own types.
            args=copy.deepcopy(settings),
            parser_kwargs={"exit_on_error": False},
        )

    def add_arguments_to_parser(self, parser) -> None:
        """The sections beside model, data and trainer, and what they fill in."""
        parser.add_class_arguments(BatchConfig, "batch")
        parser.add_class_arguments(RunConfig, "run")
        parser.add_class_arguments(CheckpointConfig, "checkpoint")
        parser.add_class_arguments(ValidationConfig, "validation")
        parser.add_class_arguments(EvaluationConfig, "evaluation")
        parser.add_class_arguments(GuardConfig, "guard")
        parser.add_argument("--seed", type=int, default=Recipe.seed)
        parser.add_argument("--compile", type=bool, default=Recipe.compile)
        parser.add_argument("--fp8", type=bool, default=Recipe.fp8)
        parser.add_argument(
            "--activation_checkpointing", type=bool, default=Recipe.activation_checkpointing
        )
        parser.add_argument("--resume", type=str, default=Recipe.resume)
        for source, target in (
            ("batch.tokens", "model.batch_tokens"),
            ("seed", "model.seed"),
            ("compile", "model.compile"),
            ("fp8", "model.fp8"),
            ("activation_checkpointing", "model.activation_checkpointing"),
            ("model.config.sequence_len", "data.init_args.sequence_len"),
            ("batch.micro", "data.init_args.micro"),
            ("seed", "data.init_args.seed"),
            ("validation.tokens", "data.init_args.validation_tokens"),
        ):
            parser.link_arguments(source, target)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list) -> Trainer:
        own = dict(self.trainer_arguments)
        loggers = config.get("logger")
        loggers = loggers if isinstance(loggers, list) else [loggers]
        config["logger"] = own.pop("loggers") + [
            x for x in loggers if not isinstance(x, bool) and x
        ]
        environment, config["devices"], config["num_nodes"] = processes(
            config.get("devices"), config.get("num_nodes")
        )
        config["plugins"] = [environment, *(config.get("plugins") or [])]
        config["strategy"], config["precision"] = choose_strategy(
            config.get("strategy"), config.get("precision")
        )
        callbacks = [*callbacks, *own.pop("callbacks")]
        config = {name: value for name, value in config.items() if name not in DERIVED}
        return super()._instantiate_trainer(config | own, callbacks)

    def resolved_data(self) -> dict:
        """class_path and init_args of the DataModule with every default spelled out."""
        return yaml.safe_load(self.parser.dump(self.config))["data"]


def _check_class(section: dict, where: str, origin: str) -> None:
    """Names the nearest argument for an unknown one of ``section``'s class, if it can be found."""
    from importlib import import_module

    path, arguments = section.get("class_path"), section.get("init_args") or {}
    module_name, _, class_name = str(path).rpartition(".")
    try:
        known = inspect.signature(getattr(import_module(module_name), class_name)).parameters
    except (ImportError, ValueError, AttributeError, TypeError):
        raise UserError(f"{origin}: {where}.class_path {path} cannot be imported") from None
    for name, value in arguments.items():
        here = f"{where}.init_args.{name}"
        if name not in known:
            options = [f"{where}.init_args.{option}" for option in known]
            raise unknown_key(here, options, origin)
        if isinstance(value, dict) and "class_path" in value:
            _check_class(value, here, origin)


def build_cli(settings: dict, trainer_arguments: dict[str, Any], origin: str) -> RecipeCLI:
    """The objects of a recipe; every problem is a `UserError`."""
    if not settings.get("data"):
        raise UserError(f"{origin}: the recipe has no data section")
    trainer_keys = inspect.signature(Trainer.__init__).parameters
    for key in settings.get("trainer") or {}:
        if key in DERIVED:
            raise UserError(
                f"{origin}: trainer.{key} follows from {DERIVED[key]}: set that instead"
            )
        if key not in trainer_keys:
            options = [f"trainer.{name}" for name in trainer_keys if name != "self"]
            raise unknown_key(f"trainer.{key}", options, origin)
    _check_class(settings["data"], "data", origin)
    with _user_errors(origin):
        return RecipeCLI(settings, trainer_arguments)


@contextmanager
def _user_errors(origin: str) -> Iterator[None]:
    """Turns what jsonargparse makes of a wrong value into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise UserError(f"{origin}: {cause}") from None
            cause = cause.__cause__ or cause.__context__
        if type(error).__module__.startswith(("jsonargparse", "argparse")):
            raise UserError(f"{origin}: {one_line(error)}") from None
        raise


def build_data(recipe: Recipe, origin: str) -> LightningDataModule:
    """The recipe's DataModule alone, with what the other sections fill in."""
    from jsonargparse import ArgumentParser

    if not recipe.data:
        raise UserError(f"{origin}: the recipe has no data section")
    _check_class(recipe.data, "data", origin)
    filled = {
        "sequence_len": recipe.model.config.sequence_len,
        "micro": recipe.batch.micro,
        "seed": recipe.seed,
        "validation_tokens": recipe.validation.tokens,
    }
    arguments = {**(recipe.data.get("init_args") or {}), **filled}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    with _user_errors(origin):
        parsed = parser.parse_object({"data": {**recipe.data, "init_args": arguments}})
        return parser.instantiate(parsed).data


def prepare(recipe: Recipe, origin: str, processes: int | None, shard: tuple[int, int]) -> None:
    """Makes the recipe's tokenizer and packed shards, or what is missing of them."""
    corpus = build_data(recipe, origin).corpus
    before = corpus.is_prepared()
    corpus.prepare(processes, shard)
    if not corpus.is_prepared():
        print(f"{corpus.directory}: the other --shard parts are missing")
    elif before:
        print(f"{corpus.directory} holds everything already")


def _quiet_lightning() -> None:
    """Leaves the screen to the run's own lines; warnings about what we decide are not news."""
    for name, level in (
        ("lightning.pytorch", logging.WARNING),
        ("lightning.fabric", logging.WARNING),
        # gloo has no all-to-all; its replacement is announced by every rank.
        ("torch.distributed.tensor._collective_utils", logging.ERROR),
    ):
        logging.getLogger(name).setLevel(level)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*is not a subclass of.*DataLoader.*",
        ".*LightningCLI's args parameter is intended.*",
        ".*is smaller than the logging interval.*",
        ".*It is recommended to use `self.log\\('val_bpb'.*",  # the metric reduces it
        ".*GPU available but not used.*",
        ".*`srun` command is available on your system.*",  # distributed.processes says it
        ".*torch.distributed is disabled, unavailable or uninitialized.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _trainer_arguments(recipe: Recipe, loggers: list, callbacks: list) -> dict:
    return {
        "loggers": loggers,
        "callbacks": callbacks,
        # Lightning looks there for checkpoints of its own, which it would prefer.
        "default_root_dir": str(Path(recipe.run.root) / (recipe.run.name or "")),
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }


def _leave_signals_to_us(trainer: Trainer) -> None:
    """Lightning would replace our handlers, and have all ranks talk in every micro-batch."""
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def _check_same_run(run: Path, resolved: dict) -> None:
    """Refuses to resume under settings that the run was not trained with."""
    old = read_yaml(run / "config.yaml")
    for section in FIXED_BY_RUN:
        difference = first_difference(part_of(old, section), part_of(resolved, section), section)
        if difference:
            key, before, now = difference
            raise UserError(
                f"{run} was trained with {key} {before!r}, not {now!r}: use another run.name, or "
                "--resume never to start it afresh"
            )


def _evaluator(
    run: Path, recipe: Recipe, checkpointer: Checkpointer, watchdog: Watchdog
) -> list[Callback]:
    """The benchmarks' callback, where there are any: lm-eval takes seconds to import."""
    if not recipe.evaluation.tasks:
        return []
    from evaluation.callback import Evaluator

    def should_stop() -> bool:
        watchdog.note("evaluation")
        return received() != 0

    def stop(trainer: Trainer, module: BoVModule) -> None:
        checkpointer.stop_if_told(trainer, module, trainer.strategy.agree_on_signal())

    every = recipe.checkpoint.every_steps
    return [Evaluator(run, recipe.evaluation, every, should_stop, stop)]


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
def fit(recipe: Recipe, settings: dict, origin: str) -> None:
    """Trains the recipe, or continues the run of its name, and prints val_bpb at the end.

    Args:
        recipe: the typed recipe.
        settings: the same as plain data, for LightningCLI.
        origin: what to call the recipe in error messages.
    """
    started = time.monotonic()
    _quiet_lightning()
    run = Path(recipe.run.root) / recipe.run.name
    batch, config = recipe.batch, recipe.model.config
    if recipe.model.budget is None:
        raise UserError(f"{origin}: model.budget is not set: give flops, tokens or steps")
    # One device divides what any number of devices could: refuse before Lightning starts.
    accumulation(batch.tokens, batch.micro, config.sequence_len, 1)

    resolved = {name: plain(value) for name, value in vars(recipe).items() if name != "resume"}
    loggers, status = [MetricsCSV(run), TensorBoardEvents(run)], Status(recipe.run.name)
    reference = recipe.run.reference and find_reference(recipe.run.reference, recipe.run.root)
    reporter = Reporter(status, reference, recipe.validation.tokens)
    run_files = RunFiles(run, "", {})
    # A requeued job continues whatever its command line says: it would never end otherwise.
    resume = recipe.resume == "auto" or restarted()
    # Weights & Biases, where a recipe asks for it, would begin a new run at every requeue.
    os.environ.setdefault("WANDB_RUN_ID", logger_run_id(run, not resume))
    os.environ.setdefault("WANDB_RESUME", "allow")
    checkpointer = Checkpointer(run, recipe.checkpoint, recipe.validation, resume)
    status.checkpoint = checkpointer.state
    watchdog = Watchdog(recipe.guard.late_after_s)
    callbacks = [watchdog, run_files, Control(recipe.guard), reporter, checkpointer]
    # After the checkpointer: what is evaluated has been saved.
    callbacks += _evaluator(run, recipe, checkpointer, watchdog)
    cli = build_cli(settings, _trainer_arguments(recipe, loggers, callbacks), origin)
    resolved["data"] = cli.resolved_data()
    trainer, module = cli.trainer, cli.model
    config_yaml = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    run_files.config_yaml = checkpointer.config_yaml = config_yaml
    run_files.figures = make_plan(config, recipe.model.budget, batch.tokens)

    n_micro = accumulation(batch.tokens, batch.micro, config.sequence_len, trainer.world_size)
    trainer.accumulate_grad_batches = n_micro
    trainer.fit_loop.epoch_loop.max_steps = module.n_step
    trainer.val_check_interval = recipe.validation.every_steps * n_micro

    if resume and complete_checkpoints(run):
        _check_same_run(run, resolved)
    if not resume and trainer.is_global_zero and run.exists():
        say(f"moved the old run to {move_aside(run)}")
    _leave_signals_to_us(trainer)
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    seed_everything(recipe.seed, workers=True, verbose=False)
    try:
        trainer.fit(module, datamodule=cli.datamodule)
        if reporter.validated_step != trainer.global_step:
            trainer.validate(module, datamodule=cli.datamodule, verbose=False)
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
    if trainer.is_global_zero:
        minutes = (time.monotonic() - started) / 60
        print(f"val_bpb {reporter.latest['val_bpb']:.4f}")
        print(f"run {run} (step {trainer.global_step}, {minutes:.1f} min)")


@_own_process_group()
def validate(checkpoint: Path, recipe: Recipe, settings: dict, origin: str) -> float:
    """Prints and returns the checkpoint's val_bpb on the recipe's held-out text."""
    from bov_lightning.checkpoint.directory import TOKENIZER, load_weights

    _quiet_lightning()
    cli = build_cli(settings, _trainer_arguments(recipe, [], []), origin)
    module, data = cli.model, cli.datamodule
    module.configure_model()
    load_weights(module.model, read_weights(checkpoint), checkpoint)
    if (checkpoint / TOKENIZER).is_dir():
        from data_modules.tokenizer import tokenizer_hash

        data.prepare_data()
        own, theirs = (
            tokenizer_hash(checkpoint / TOKENIZER),
            tokenizer_hash(data.tokenizer_directory),
        )
        if own != theirs:
            raise UserError(
                f"{checkpoint} was trained with another tokenizer than that of the data "
                f"({own}, not {theirs}): use data.init_args.tokenizer.path {checkpoint / TOKENIZER}"
            )
    cli.trainer.validate(module, datamodule=data, verbose=False)
    val_bpb = float(cli.trainer.callback_metrics["val_bpb"])
    if cli.trainer.is_global_zero:
        print(f"val_bpb {val_bpb:.4f}")
    return val_bpb
