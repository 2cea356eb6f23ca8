"""Other people's private parts that we touch: each is there, and one that goes is named."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy

from bov_lightning.distributed.strategy import ShardedStrategy
from bov_lightning.training import internals
from bov_lightning.upstream import require

PARTS = [
    # Lightning: training/internals.py, distributed/strategy.py, distributed/processes.py
    "lightning.pytorch.cli:LightningCLI._instantiate_trainer",
    "lightning.pytorch:Trainer._signal_connector",
    "lightning.pytorch:Trainer._checkpoint_connector",
    "lightning.pytorch.strategies:Strategy.restore_checkpoint_after_setup",
    "lightning.pytorch.strategies:Strategy.lightning_restore_optimizer",
    "lightning.pytorch.strategies:ModelParallelStrategy._data_parallel_size",
    "lightning.pytorch.strategies:ModelParallelStrategy._device_mesh",
    "lightning.pytorch.plugins.environments:SLURMEnvironment.validate_settings",
    # torch: model/matmul.py, optim/muon_adamw.py, checkpoint/writing.py, planning/memory.py,
    # training/module.py
    "torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
    "torch:ops.mkldnn._linear_pointwise",
    "torch:_foreach_mul_",
    "torch.distributed.checkpoint.staging:BlockingAsyncStager.stage",
    "torch:UntypedStorage.resize_",
    "torch.autograd:Function.apply",
    "torch.testing._internal.distributed.fake_pg:FakeStore",
    "torch._subclasses.fake_tensor:FakeTensorMode",
    "torch._guards:active_fake_mode",
    "torch.distributed.tensor.placement_types:shard_dim_alltoall",
    "torch.utils._python_dispatch:TorchDispatchMode._should_skip_dynamo",
    # transformers: interop/hf_model.py
    "transformers:GenerationMixin._prepare_cache_for_generation",
    "transformers:GenerationMixin._prepare_position_ids_for_generation",
    "transformers:PreTrainedModel._init_weights",
    "transformers:PreTrainedModel._is_stateful",
    "transformers:PreTrainedModel._set_gradient_checkpointing",
    # lm-eval: evaluation/scorer.py, evaluation/runner.py
    "lm_eval.api.task:Task.apply_filters",
    "lm_eval.api.task:Task.doc_iterator",
]
"""``module:path`` of what is private, or replaced by us; Trainer's are looked for on an object."""


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_there(part, trainer):
    module, _, path = part.partition(":")
    owner = importlib.import_module(module)
    for name in path.split("."):
        if owner is Trainer:
            owner = trainer
        elif owner is ModelParallelStrategy:
            owner = ShardedStrategy()
        assert hasattr(owner, name), f"{part}: {name} is gone"
        owner = getattr(owner, name)


@pytest.mark.parametrize(
    ("call", "owner", "name"),
    [
        (internals.leave_signals_to_us, "_signal_connector", "register_signal_handlers"),
        (internals.leave_signals_to_us, "fit_loop.epoch_loop", "_broadcast_sigterm_tensor"),
        (lambda t: internals.set_lengths(t, 1, 1, 1), "fit_loop.epoch_loop", "max_steps"),
        (lambda t: internals.set_lengths(t, 1, 1, 1), "", "val_check_interval"),
        (internals.validate_now, "fit_loop.epoch_loop.val_loop", "restarting"),
        (lambda t: internals.hand_over_state(t, {}), "_checkpoint_connector", "_loaded_checkpoint"),
    ],
)  # fmt: skip
def test_a_part_that_is_gone_is_named(call, owner, name):
    """An assignment to it would go unnoticed, and our handlers and lengths would be ignored."""

    class Without:
        """Has every attribute but one, and remembers no assignment."""

        def __init__(self, path: str):
            self.__dict__["path"] = path

        def __getattr__(self, attribute: str):
            if self.path == owner and attribute == name:
                raise AttributeError(attribute)
            if attribute == "run":
                return lambda: None
            return Without(f"{self.path}.{attribute}".strip("."))

        def __setattr__(self, attribute: str, value) -> None:
            pass

    with pytest.raises(RuntimeError, match=rf"no Without\.{name} any more"):
        call(Without(""))


def test_parts_that_are_there_raise_nothing(trainer):
    internals.leave_signals_to_us(trainer)
    internals.set_lengths(trainer, n_micro=2, n_step=6, validate_every=3)
    assert (trainer.accumulate_grad_batches, trainer.max_steps) == (2, 6)
    assert trainer.val_check_interval == 6
    assert internals.trainer_of(LightningModule()) is None
    with pytest.raises(RuntimeError, match="lightning has no LightningCLI.run_all any more"):
        require(LightningCLI, "run_all")


def test_steps_are_counted_in_this_runs_micro_batches():
    counts = {"ready": 9, "started": 9, "processed": 9, "completed": 8}
    progress = {"total": dict(counts), "current": dict(counts)}
    state = {"global_step": 3, "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}
    internals.count_steps_in_micro_batches(state, n_micro=2)
    expected = {"ready": 6, "started": 6, "processed": 6, "completed": 5}
    assert progress == {"total": expected, "current": expected}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_ranks_find_their_files_by_torchs_name(tmp_path):
    """`CheckpointWriter` takes the files of a rank to be those of this name."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    dcp.save({"x": torch.ones(2)}, storage_writer=writer, no_dist=True)
    assert [path.name[:12] for path in tmp_path.glob("*.safetensors")] == ["shard-00001-"]


def test_the_name_of_the_library_is_said():
    with pytest.raises(RuntimeError, match=r"this version of types has no SimpleNamespace\.x"):
        require(SimpleNamespace(), "x")
