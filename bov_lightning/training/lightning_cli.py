"""From a merged recipe to DataModule, module and Trainer, by LightningCLI."""

import copy
import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import Logger

from bov_lightning.distributed.layout import count_devices
from bov_lightning.distributed.processes import processes
from bov_lightning.distributed.strategy import choose_strategy
from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.recipe.building import user_errors
from bov_lightning.recipe.data_module import DATA_LINKS, check_class, data_section
from bov_lightning.recipe.given import Given
from bov_lightning.recipe.keys import unknown_key
from bov_lightning.recipe.sameness import plain
from bov_lightning.recipe.sections import BudgetConfig, Recipe
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
}
"""Arguments of the Trainer that other sections decide."""


IMPOSSIBLE = {
    "enable_progress_bar": "bov shows its own",
    "fast_dev_run": "try --model.budget.steps 2 with another --run.name instead",
    "barebones": "a run writes checkpoints and metrics",
    "overfit_batches": "train on less text instead",
    "limit_train_batches": "model.budget says how long to train",
    "reload_dataloaders_every_n_epochs": "the data is read once, in one order",
}
"""Arguments of the Trainer that a recipe cannot set (but to null, false or 0), and why."""

CONFLICTING = {
    "Checkpoint": "the checkpoint section says when checkpoints are written and which are kept",
    "ProgressBar": "bov shows its own",
    "GradientAccumulationScheduler": "batch.tokens and batch.micro say how a step is divided",
    "BatchSizeFinder": "batch.micro says it",
    "LearningRateFinder": "model.optimizer says them",
}
"""Callbacks of Lightning, by the name of their class or of one above it, that change what a section
of the recipe says."""

SECTIONS = {"model", "data", "trainer", *(key.partition(".")[0] for key in DATA_LINKS.values())}
"""What of a recipe LightningCLI sees."""

_recipe: ContextVar[Recipe] = ContextVar("recipe")
"""What `_module` makes a module for: LightningCLI calls it with the model section alone."""


def _module(
    config: TransformerConfig,
    optimizer: OptimizerConfig = OptimizerConfig(),
    budget: BudgetConfig | None = None,
) -> BoVModule:
    return BoVModule(_recipe.get())


class RecipeCLI(LightningCLI):
    """Builds DataModule, module and Trainer from a merged recipe."""

    def __init__(
        self, given: Given, loggers: list[Logger], make_callbacks: Callable[[str], list[Callback]]
    ):
        """
        Args:
            given: the recipe.
            loggers: our own, before those that the recipe adds.
            make_callbacks: gives our own callbacks, after those that the recipe adds, for the
                resolved recipe as YAML.
        """
        self.given, self.loggers, self.make_callbacks = given, loggers, make_callbacks
        self.sections = {name: given.plain[name] for name in SECTIONS if name in given.plain}
        self.sections["data"] = data_section(given)
        token = _recipe.set(given.recipe)
        super().__init__(
            _module,
            LightningDataModule,
            subclass_mode_data=True,
            seed_everything_default=False,
            save_config_callback=None,
            run=False,
            # A copy: jsonargparse turns parts of what it is given into its own types.
            args=copy.deepcopy(self.sections),
            parser_kwargs={"exit_on_error": False},
        )
        _recipe.reset(token)

    def add_arguments_to_parser(self, parser) -> None:
        """The sections beside model, data and trainer, and what they fill in."""
        hints = get_type_hints(Recipe)
        for name in sorted(SECTIONS - {"model", "data", "trainer"}):
            kind = hints[name]
            if is_dataclass(kind):
                parser.add_class_arguments(kind, name)
            else:
                parser.add_argument(f"--{name}", type=kind, default=getattr(Recipe, name))
        for target, source in DATA_LINKS.items():
            parser.link_arguments(source, target)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list) -> Trainer:
        config = {name: value for name, value in config.items() if name not in DERIVED}
        _refuse_conflicts(config.get("callbacks"))
        loggers = config.get("logger")
        loggers = loggers if isinstance(loggers, list) else [loggers]
        added = [x for x in loggers if not isinstance(x, bool) and x]
        environment, n_device, n_node = processes(config.get("devices"), config.get("num_nodes"))
        strategy, precision = choose_strategy(config.get("strategy"), config.get("precision"))
        config |= {
            "logger": [*self.loggers, *added],
            "plugins": [environment, *(config.get("plugins") or [])],
            "devices": n_device,
            "num_nodes": n_node,
            "strategy": strategy,
            "precision": precision,
            # Lightning looks there for checkpoints of its own, which it would prefer.
            "default_root_dir": str(self.given.run),
            "max_epochs": -1,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
        }
        callbacks = [*callbacks, *self.make_callbacks(self.resolved_yaml)]
        return super()._instantiate_trainer(config, callbacks)

    @functools.cached_property
    def resolved_yaml(self) -> str:
        """The whole recipe, with every default of its data section spelled out."""
        recipe = vars(self.given.recipe)
        resolved = {name: plain(value) for name, value in recipe.items() if name != "resume"}
        resolved["data"] = yaml.safe_load(self.parser.dump(self.config))["data"]
        return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)


def _refuse_conflicts(callbacks: Any) -> None:
    """Names what of the recipe says what a callback would say too."""
    for callback in callbacks if isinstance(callbacks, list) else filter(None, [callbacks]):
        for base in type(callback).__mro__:
            if base.__name__ in CONFLICTING and base.__module__.startswith("lightning"):
                raise UserError(
                    f"trainer.callbacks: {type(callback).__name__} cannot be used: "
                    f"{CONFLICTING[base.__name__]}"
                )


def build_cli(
    given: Given,
    loggers: list[Logger] | None = None,
    make_callbacks: Callable[[str], list[Callback]] = lambda config_yaml: [],
) -> RecipeCLI:
    """The objects of a recipe; every problem is a `UserError`."""
    trainer_keys = inspect.signature(Trainer.__init__).parameters
    trainer = given.plain.get("trainer") or {}
    for key, value in trainer.items():
        if key in DERIVED:
            raise given.error(f"trainer.{key} follows from {DERIVED[key]}: set that instead")
        if key in IMPOSSIBLE and value:
            raise given.error(f"trainer.{key} cannot be set: {IMPOSSIBLE[key]}")
        if key not in trainer_keys:
            options = [f"trainer.{name}" for name in trainer_keys if name != "self"]
            raise unknown_key(f"trainer.{key}", options, given.origin)
    data = data_section(given)
    check_class(data, "data", given.origin, LightningDataModule)
    for key, value in trainer.items():
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            # jsonargparse knows the classes of Lightning by their names alone, too.
            if isinstance(item, dict) and "." in str(item.get("class_path")):
                where = f"trainer.{key}[{i}]" if isinstance(value, list) else f"trainer.{key}"
                check_class(item, where, given.origin)
    with user_errors(given.origin):
        count_devices(trainer.get("devices"))
        return RecipeCLI(given, loggers or [], make_callbacks)
