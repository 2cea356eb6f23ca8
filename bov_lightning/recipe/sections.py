"""The typed sections of a recipe."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from bov_lightning.errors import UserError
from bov_lightning.kinds import COUNT, PATH, SEED, Range, check_least
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.lookup import source_class
from bov_lightning.optim.config import OptimizerConfig

MAX_NAME = 200
"""Bytes of a run's name: file systems take 255, and jobs and sweeps add to it."""


@dataclass(frozen=True)
class BudgetConfig:
    """How long to train. Exactly one of the four."""

    flops: Annotated[float | None, Range(above=0, most=10**40)] = None
    """Training FLOPs of the whole run."""

    tokens: Annotated[float | None, Range(above=0, most=10**40)] = None
    """Training tokens of the whole run."""

    tokens_per_param: Annotated[float | None, Range(above=0, most=10**40)] = None
    """Training tokens per scaling parameter (block matrices and head, with standard values)."""

    steps: Annotated[int | None, COUNT] = None
    """Optimizer steps."""

    def __post_init__(self):
        given = [name for name in vars(self) if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise UserError(
                f"model.budget needs exactly one of flops, tokens, tokens_per_param and steps, "
                f"not {found}"
            )
        check_least(self, "model.budget")


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

    tokens: Annotated[int, COUNT] = 524288
    """Tokens per optimizer step, over all devices."""
    micro: Annotated[int, COUNT] = 16
    """Sequences per device and micro-step."""

    def __post_init__(self):
        check_least(self, "batch")


@dataclass(frozen=True)
class RunConfig:
    """Where the run lies: root/name."""

    name: str | None = None
    """Name of the run directory; a new name starts a new run. null: the name of the recipe file,
    and of the overlays that change the model (quickstart-standard)."""
    root: Annotated[str, PATH] = "runs"
    """Folder of all runs."""
    reference: Annotated[str | None, PATH] = None
    """Another run, by its name in root or by its path, beside whose val_bpb at the same number of
    tokens that of this run is shown; it may still be training."""

    def __post_init__(self):
        if self.name is None:
            return
        if self.name in ("", "..") or Path(self.name).name != self.name:
            raise UserError(
                f"run.name {self.name!r} must be one folder name: use run.root for paths"
            )
        if not self.name.isprintable():
            raise UserError(f"run.name {self.name!r} has characters that cannot be printed")
        if len(self.name.encode()) > MAX_NAME:
            raise UserError(f"run.name has {len(self.name.encode())} bytes: at most {MAX_NAME}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept. The last step is always written."""

    every_steps: Annotated[int, COUNT] = 500
    """Optimizer steps between checkpoints."""
    keep_last: Annotated[int, COUNT] = 2
    """How many of the newest to keep."""
    keep_every: Annotated[int | None, COUNT] = None
    """Also keep every checkpoint whose step is a multiple of this."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written."""

    def __post_init__(self):
        check_least(self, "checkpoint")


@dataclass(frozen=True)
class ValidationConfig:
    """When bits per byte are measured on held-out text. The last step is always validated."""

    every_steps: Annotated[int, COUNT] = 250
    """Optimizer steps between validations."""
    tokens: Annotated[int | None, COUNT] = None
    """Tokens to validate on, from the start of the held-out rows; null: all of them."""

    def __post_init__(self):
        check_least(self, "validation")


@dataclass(frozen=True)
class GuardConfig:
    """What a run does when something goes wrong while nobody looks."""

    max_skipped_steps: Annotated[int, COUNT] = 10
    """A step whose gradients hold NaN or infinity is skipped; so many in a row end the run."""
    spike_deviations: Annotated[float, Range(above=0)] = 8.0
    """A loss so many standard deviations above its recent mean is reported and counted."""
    late_after_s: Annotated[float, Range(above=0, most=2**40)] = 300.0
    """Seconds without progress after which the ranks that are late are named."""

    def __post_init__(self):
        check_least(self, "guard")


@dataclass(frozen=True)
class EvaluationConfig:
    """Benchmarks that are run during training; docs/evaluation.md explains them."""

    tasks: list[str] = field(default_factory=list)
    """Tasks and groups: core_paper, heldout, or any name that lm-eval knows. Empty: none."""
    every_steps: Annotated[int | None, COUNT] = None
    """Optimizer steps between evaluations; null: none in between."""
    at_checkpoints: bool = False
    """Whether to evaluate whenever a checkpoint is written."""
    at_end: bool = True
    """Whether to evaluate after the last step."""
    max_per_task: Annotated[int | None, COUNT] = None
    """Rows per task; null: all. Few-shot examples are drawn from these rows too."""
    time_limit: Annotated[float | None, Range(above=0)] = None
    """Seconds per task; rows that are left out then are reported. null: no limit."""
    data_dir: Annotated[str | None, PATH] = None
    """Directory of the CORE files; null: that of BOV_EVAL_DATA."""
    download: bool = False
    """Whether to download CORE files that are missing (checksums are verified either way)."""
    include_path: Annotated[str | None, PATH] = None
    """A folder of further lm-eval tasks."""
    tokens_per_forward: Annotated[int | None, COUNT] = None
    """Tokens per device and forward pass; null: 2048 on a CPU, 8192 on a GPU."""

    def __post_init__(self):
        check_least(self, "evaluation")


@dataclass(frozen=True)
class Recipe:
    """A whole experiment."""

    model: ModelSection = field(default_factory=ModelSection)
    """Network, optimizer, budget."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Global batch."""
    run: RunConfig = field(default_factory=RunConfig)
    """Run directory."""
    seed: Annotated[int, SEED] = 0
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
    tables_on: Literal["device", "host"] = "device"
    """Where value tables lie while they are trained. host: in the host's memory, for a bank or
    ngram_bank that a device cannot hold; the rows of a micro-step are fetched, and AdamW updates
    the rows that a step has touched, as docs/memory.md describes."""
    resume: Literal["auto", "never", "changed_code"] = "auto"
    """auto: continue from the newest complete checkpoint; never: move an old run of this name
    aside and start afresh; changed_code: as auto, though the file of a value source of your own is
    another than the run began with."""
    data: dict[str, Any] | None = None
    """class_path and init_args of a LightningDataModule."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of lightning.pytorch.Trainer, except those that other sections decide."""

    def __post_init__(self):
        if self.tables_on != "host":
            return
        name = self.model.config.value.source
        source = source_class(name)
        if not source.reads_as_bank():
            raise UserError(
                f"tables_on is host, but value.source {name} has no table whose rows can be fetched"
                ": use bank or ngram_bank, or tables_on: device"
            )
        group = source.optimizer_groups.get("table", "matrix")
        if (group if isinstance(group, str) else group[0]) == "matrix":
            raise UserError(
                f"tables_on is host, but value.source {name} has its table trained by Muon, which "
                "takes no rows alone: put it into the group table in optimizer_groups, or use "
                "tables_on: device"
            )
        if self.trainer.get("gradient_clip_val"):
            raise UserError(
                "trainer.gradient_clip_val would leave out the tables that tables_on: host keeps "
                "from the trainer: leave it out, or use tables_on: device"
            )
