"""Recipes: typed sections, strict keys, and the rules by which several YAML files become one.

A recipe is a YAML file, or several: a later one overrides an earlier one key by key, except that

- a ``budget`` or a ``class_path`` of another class replaces the whole block;
- ``key+: [...]`` extends a list.

Dotted command-line options (``--model.config.n_layer 6``) are one more overlay.
"""

import copy
import dataclasses
import difflib
import hashlib
import re
import types
import typing
from argparse import ArgumentError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from bov_lightning.errors import UserError
from bov_lightning.files import packaged_recipes
from bov_lightning.model.config import TransformerConfig
from bov_lightning.optim.groups import OptimizerConfig
from bov_lightning.recipe.budget import BudgetConfig

REPLACED_WHOLE = {"model.budget"}

FIXED_BY_RUN = ("model.config", "model.optimizer", "batch.tokens", "seed", "data")
"""What a resumed run must not change."""


@dataclass(frozen=True)
class ModelSection:
    """What is trained, how, and for how long."""

    config: TransformerConfig = field(default_factory=TransformerConfig)
    """The network's shape."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Learning rates, weight decay, schedule."""
    budget: BudgetConfig | None = None
    """How long to train."""


@dataclass(frozen=True)
class BatchConfig:
    """The global batch; the accumulation follows from it and the number of devices."""

    tokens: int = 524288
    """Tokens per optimizer step, over all devices."""
    micro: int = 16
    """Sequences per device and micro-step."""

    def __post_init__(self):
        for name in ("tokens", "micro"):
            if getattr(self, name) < 1:
                raise UserError(f"batch.{name} is {getattr(self, name)}: at least 1")


@dataclass(frozen=True)
class RunConfig:
    """Where the run lies: root/name."""

    name: str | None = None
    """Name of the run directory; a new name starts a new run. null: the name of the recipe file,
    and of the overlays that change the model (quickstart-standard)."""
    root: str = "runs"
    """Folder of all runs."""
    reference: str | None = None
    """Another run, by its name in root or by its path, beside whose val_bpb at the same number of
    tokens that of this run is shown; it may still be training."""

    def __post_init__(self):
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise UserError(
                f"run.name {self.name!r} must be one folder name: use run.root for paths"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept. The last step is always written."""

    every_steps: int = 500
    """Optimizer steps between checkpoints."""
    keep_last: int = 2
    """How many of the newest to keep."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written."""

    def __post_init__(self):
        for name in ("every_steps", "keep_last", "keep_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"checkpoint.{name} is {getattr(self, name)}: at least 1")


@dataclass(frozen=True)
class ValidationConfig:
    """When bits per byte are measured on held-out text. The last step is always validated."""

    every_steps: int = 250
    """Optimizer steps between validations."""
    tokens: int | None = None
    """Tokens to validate on, from the start of the held-out rows; null: all of them."""

    def __post_init__(self):
        for name in ("every_steps", "tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"validation.{name} is {getattr(self, name)}: at least 1")


@dataclass(frozen=True)
class GuardConfig:
    """What a run does when something goes wrong while nobody looks."""

    max_skipped_steps: int = 10
    """A step whose gradients hold NaN or infinity is skipped; so many in a row end the run."""
    spike_deviations: float = 8.0
    """A loss so many standard deviations above its recent mean is reported and counted."""
    late_after_s: float = 300.0
    """Seconds without progress after which the ranks that are late are named."""

    def __post_init__(self):
        for name in ("max_skipped_steps", "spike_deviations", "late_after_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"guard.{name} is {getattr(self, name)}: more than 0")


@dataclass(frozen=True)
class EvaluationConfig:
    """Benchmarks that are run during training; docs/evaluation.md explains them."""

    tasks: list[str] = field(default_factory=list)
    """Tasks and groups: core_paper, heldout, or any name that lm-eval knows. Empty: none."""
    every_steps: int | None = None
    """Optimizer steps between evaluations; null: none in between."""
    at_checkpoints: bool = False
    """Whether to evaluate whenever a checkpoint is written."""
    at_end: bool = True
    """Whether to evaluate after the last step."""
    max_per_task: int | None = None
    """Rows per task; null: all. Few-shot examples are drawn from these rows too."""
    time_limit: float | None = None
    """Seconds per task; rows that are left out then are reported. null: no limit."""
    data_dir: str | None = None
    """Directory of the CORE files; null: that of BOV_EVAL_DATA."""
    download: bool = False
    """Whether to download CORE files that are missing (checksums are verified either way)."""
    include_path: str | None = None
    """A folder of further lm-eval tasks."""
    tokens_per_forward: int | None = None
    """Tokens per device and forward pass; null: 2048 on a CPU, 8192 on a GPU."""

    def __post_init__(self):
        for name in ("every_steps", "max_per_task", "tokens_per_forward"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"evaluation.{name} is {getattr(self, name)}: at least 1")
        if self.time_limit is not None and self.time_limit <= 0:
            raise UserError(f"evaluation.time_limit is {self.time_limit}: more than 0")


@dataclass(frozen=True)
class Recipe:
    """A whole experiment."""

    model: ModelSection = field(default_factory=ModelSection)
    """Network, optimizer, budget."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Global batch."""
    run: RunConfig = field(default_factory=RunConfig)
    """Run directory."""
    seed: int = 0
    """Seed of initialisation and data order."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Bits per byte on held-out text."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Benchmarks."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What happens when something goes wrong."""
    compile: bool = False
    """Whether to compile each block with torch.compile (needs a C++ compiler on CPU)."""
    fp8: bool = False
    """Whether the blocks multiply in fp8 (needs torchao and a GPU of Ada, Hopper or newer)."""
    activation_checkpointing: bool = False
    """Whether to recompute activations in the backward pass instead of keeping them."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest complete checkpoint; never: move an old run of this name
    aside and start afresh."""
    data: dict[str, Any] | None = None
    """class_path and init_args of a LightningDataModule."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of lightning.pytorch.Trainer, except those that other sections decide."""


def default_run_name(overlays: list[tuple[Path, dict]]) -> str:
    """The first file's name, and those of the later files that change the model."""
    first, *later = overlays
    return "-".join([first[0].stem, *(path.stem for path, data in later if "model" in data)])


def find_recipe(name: str) -> Path:
    """The file of that path; failing that the packaged recipe (``quickstart``, ``values/bov``)."""
    relative = Path(name)
    within = Path(*relative.parts[1:]) if relative.parts[:1] == ("recipes",) else relative
    packaged = packaged_recipes() / within
    for path in (relative, packaged, packaged.with_name(packaged.name + ".yaml")):
        if path.is_file():
            return path
    raise UserError(f"recipe {name} does not exist, here or among those of the package")


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; never runs code."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} is no recipe: its top level must be a mapping of keys")
    return content


def merge(base: dict, overlay: dict, path: str = "") -> dict:
    """``base`` overridden by ``overlay``, as the module's docstring says; neither is changed."""
    merged = dict(base)
    for key, value in overlay.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(key, str) and key.endswith("+"):
            old = merged.get(key[:-1]) or []
            merged[key[:-1]] = [*old, *(value if isinstance(value, list) else [value])]
            continue
        old = merged.get(key)
        other_class = (
            isinstance(old, dict) and isinstance(value, dict)
            and "class_path" in value and value["class_path"] != old.get("class_path")
        )  # fmt: skip
        if isinstance(value, dict):
            kept = isinstance(old, dict) and not other_class and here not in REPLACED_WHOLE
            merged[key] = merge(old if kept else {}, value, here)
        else:
            merged[key] = value
    return merged


def text_overlay(train: list[str], val: list[str]) -> dict:
    """An overlay that trains on text files instead; its directory is named after the patterns."""
    if not train and not val:
        return {}
    if not train or not val:
        raise UserError("--data and --val-data go together: text to train on, text to validate on")
    digest = hashlib.sha256(repr((train, val)).encode()).hexdigest()[:8]
    source = {"class_path": "data_modules.TextFiles", "init_args": {"train": train, "val": val}}
    return {"data": {"init_args": {"directory": f"data/text-{digest}", "source": source}}}


def parse_options(options: list[str]) -> dict:
    """``--a.b value`` and ``--a.b=value`` as an overlay {a: {b: value}}; values are YAML."""
    overlay: dict = {}
    remaining = list(options)
    while remaining:
        option = remaining.pop(0)
        if not option.startswith("--"):
            raise UserError(f"unexpected argument {option!r}: options look like --run.name NAME")
        key, has_value, text = option[2:].partition("=")
        if not has_value:
            if not remaining:
                raise UserError(f"option --{key} needs a value")
            text = remaining.pop(0)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--{key} {text}: the value is no YAML") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        overlay = merge(overlay, value)
    return overlay


def plain(value: Any) -> Any:
    """A section as plain data; anything else as it is."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def part_of(data: Any, key: str) -> Any:
    """What lies at a dotted key; None where there is nothing."""
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def first_difference(old: Any, new: Any, key: str) -> tuple[str, Any, Any] | None:
    """(dotted key, old value, new value) where they differ first; keys of ``new`` alone are fine:

    they came with a newer version.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old:
            if found := first_difference(old.get(name), new.get(name), f"{key}.{name}"):
                return found
        return None
    return None if old == new else (key, old, new)


def _dataclass_of(annotation: Any) -> type | None:
    """The dataclass in an annotation ``D`` or ``D | None``."""
    options = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def known_keys(cls: type, path: str = "") -> list[str]:
    """All dotted keys of a config dataclass."""
    keys = []
    for name, annotation in typing.get_type_hints(cls).items():
        here = f"{path}.{name}" if path else name
        nested = _dataclass_of(annotation)
        keys += [here, *(known_keys(nested, here) if nested else [])]
    return keys


def nearest(key: str, known: list[str]) -> str | None:
    """The known dotted key that was probably meant."""
    section, _, name = key.rpartition(".")
    same_section = [k for k in known if k.rpartition(".")[0] == section]
    same_name = [k for k in known if k.rpartition(".")[2] == name]
    for candidates, cutoff in ((same_section, 0.7), (same_name, 0.0), (known, 0.5)):
        if close := difflib.get_close_matches(key, candidates, n=1, cutoff=cutoff):
            return close[0]
    return None


def unknown_key(key: str, known: list[str], origin: str) -> UserError:
    """The error for a key that does not exist."""
    guess = nearest(key, known)
    hint = f"did you mean {guess}?" if guess else f"known: {', '.join(known)}"
    return UserError(f"{origin}: unknown key {key}: {hint}")


def check_keys(data: dict, origin: str, cls: type = Recipe, path: str = "") -> None:
    """Refuses keys that no section has, naming the nearest; values are checked elsewhere."""
    hints = typing.get_type_hints(cls)
    for key, value in data.items():
        name = str(key).removesuffix("+")
        here = f"{path}.{name}" if path else name
        if name not in hints:
            raise unknown_key(here, known_keys(Recipe), origin)
        nested = _dataclass_of(hints[name])
        if nested is None:
            continue
        if isinstance(value, dict):
            check_keys(value, origin, nested, here)
        elif value is not None:
            raise UserError(f"{origin}: {here} is {value!r}, but must be a section with keys")


def import_source(overlay: dict, origin: str) -> None:
    """Imports the module of a value source that ``overlay`` names by its class path.

    For recipes that the user gives; what a checkpoint names is not imported for it.
    """
    value = ((overlay.get("model") or {}).get("config") or {}).get("value") or {}
    if "." not in str(value.get("source")):
        return
    from bov_lightning.model.values import import_module_of

    try:
        import_module_of(str(value["source"]))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def fill_vocab_size(settings: dict) -> dict:
    """``settings`` with model.config.vocab_size taken from the data's tokenizer, if it is null.

    A tokenizer that is still to be trained counts with the size that it is asked for.
    """
    config = (settings.get("model") or {}).get("config") or {}
    data = settings.get("data")
    if config.get("vocab_size") is not None or not isinstance(data, dict):
        return settings
    tokenizer = (data.get("init_args") or {}).get("tokenizer") or {}
    if tokenizer.get("path"):
        from data_modules.tokenizer import read_tokenizer

        vocab_size = read_tokenizer(tokenizer["path"]).get_vocab_size()
    else:
        vocab_size = tokenizer.get("vocab_size")
    return merge(settings, {"model": {"config": {"vocab_size": vocab_size}}})


def build(cls: type, data: dict, origin: str, path: str = "") -> Any:
    """A config dataclass from plain data whose keys are known; types are checked.

    Every problem is a `UserError` that names ``origin`` and the key.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    # A class named below `data` is built by LightningCLI, which knows what it may be; not here.
    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, path or None)
    try:
        # A copy: jsonargparse turns parts of what it is given into its own types.
        given = copy.deepcopy(data)
        parsed = parser.parse_object({path: given} if path else given)
        built = parser.instantiate(parsed)
        return built[path] if path else cls(**vars(built))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{origin}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """The gist of one of jsonargparse's multi-line messages."""
    if isinstance(error.__cause__, UserError):
        return str(error.__cause__)
    text = str(error)
    key = re.search(r'key "([^"]+)"', text)
    expected = re.findall(r"Expected an? (.+?)(?:\. Got|\n|$)", text)
    value = re.search(r"(?:Given value|Got value): (.*)", text)
    if not (key and expected and value):
        return " ".join(text.split())
    options = [re.sub(r"<class '(.+)'>|typing\.Literal", r"\1", option) for option in expected]
    return f"{key[1]} is {value[1]!r}, but must be {' or '.join(options)}"
