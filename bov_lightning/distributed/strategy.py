"""How a run spreads over devices: FSDP2 by default, DDP on request.

Both strategies read and write checkpoints through `bov_lightning.checkpoint`, so that a run may
change its strategy and the number of its devices.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from bov_lightning.distributed import preemption
from bov_lightning.distributed.layout import (
    Layout,
    check_replicate,
    is_sharded_strategy,
    param_dtype_of,
)
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.distributed.sharding import gathered_once, make_mesh, shard, write_part
from bov_lightning.kinds import Range
from bov_lightning.model.layers import Initialiser
from bov_lightning.model.transformer import Transformer
from bov_lightning.upstream import require

require(Strategy, "restore_checkpoint_after_setup", "lightning_restore_optimizer")
require(ModelParallelStrategy, "block_backward_sync")


class ControlGroup:
    """What both strategies share: our own checkpoints, and a group of CPU processes for agreements.

    Messages between ranks (has anybody been told to stop, has the checkpoint been written) must not
    wait for the device, so they go through a gloo group of their own.
    """

    # Lightning asks a strategy for these two: the optimizer is there before anything is restored,
    # and by whom.
    restore_checkpoint_after_setup = True
    lightning_restore_optimizer = False
    ranks = Ranks()
    """For the messages of the training loop."""
    on_start: Callable[[Ranks], None] = staticmethod(lambda ranks: None)
    """Called on every rank as soon as they can agree, before any data is prepared."""

    def setup_environment(self) -> None:
        """Starts the process groups."""
        if self.world_size == 1 and not dist.is_initialized():
            # One process needs no port to meet anybody at.
            backend = "nccl" if self.root_device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        super().setup_environment()
        self.ranks = self.new_ranks()
        self.on_start(self.ranks)

    def new_ranks(self) -> Ranks:
        """All ranks, with a group of their own for one thread's messages."""
        return Ranks(dist.new_group(backend="gloo") if self.world_size > 1 else None)

    def agree(self, loss: float) -> tuple[float, int]:
        """The mean loss of all ranks, and the exit code that a signal on any of them asks for.

        Where ranks were told different things, Ctrl-C counts, then SIGTERM: nobody requeues a job
        that somebody has cancelled.
        """
        code = preemption.received()
        codes = (preemption.INTERRUPTED, preemption.STOPPED, preemption.REQUEUE)
        total, *told = self.ranks.total([loss, *(float(code == known) for known in codes)])
        agreed = (known for known, n_rank in zip(codes, told, strict=True) if n_rank)
        return total / self.world_size, next(agreed, 0)

    def agree_on_signal(self) -> int:
        """The exit code alone."""
        return self.agree(0.0)[1]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: `bov_lightning.checkpoint.writing` stores the weights, each rank its part."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Nothing, likewise."""
        return {}

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Nothing, likewise."""

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Nothing, likewise."""


class ReplicatedStrategy(ControlGroup, DDPStrategy):
    """DDP: every device holds the whole model and optimizer. For models that fit easily."""


class ShardedStrategy(ControlGroup, ModelParallelStrategy):
    """FSDP2: parameters, gradients and optimizer state spread over all devices."""

    param_dtype: torch.dtype | None = None
    """Of gathered parameters and of activations; gradients are reduced in fp32. None: fp32."""

    def __init__(
        self,
        replicate: Annotated[int, Range(1, 100_000)] = 1,
        timeout_minutes: Annotated[float, Range(above=0, most=10**6)] = 30,
    ):
        """
        Args:
            replicate: copies of the model; each is sharded over world size / replicate devices
                (HSDP), usually those of one node.
            timeout_minutes: of collectives.
        """
        timeout = timedelta(minutes=timeout_minutes)
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, timeout=timeout)
        self.replicate = replicate

    def setup_environment(self) -> None:
        """Starts the process groups; a mesh that the devices cannot form is a `UserError`."""
        check_replicate(self.world_size, self.replicate)
        # Lightning's mesh, which is not ours, must have the size of the world.
        require(self, "_data_parallel_size", "_device_mesh")
        self._data_parallel_size = self.world_size
        super().setup_environment()
        self._device_mesh = make_mesh(self.root_device.type, self.world_size, self.replicate)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around all micro-steps of an optimizer step but the last."""
        with gathered_once(self.model.model, self.world_size):
            yield

    def build(self, model: Transformer, seed: int) -> Transformer:
        """Shards a model on the meta device, if `Layout.shards`, and then fills it.

        One parameter at a time is whole in memory.
        """
        half = self.param_dtype is not None
        if Layout(self.world_size, replicate=self.replicate, half=half).shards:
            shard(model, self._device_mesh, self.param_dtype)
        model.to_empty(device=self.root_device)
        model.initialise(Initialiser(seed, write_part))
        return model


def choose_strategy(strategy: Any, precision: Any) -> tuple[Strategy, Any]:
    """Our strategy for trainer.strategy, and the precision that is left for Lightning to handle.

    Raises:
        UserError: a strategy or precision that we do not have.
    """
    name = strategy if isinstance(strategy, str | None) else type(strategy).__name__
    kind = ShardedStrategy if is_sharded_strategy(name) else ReplicatedStrategy
    strategy = kind() if isinstance(strategy, str | None) else strategy
    if kind is ReplicatedStrategy:
        return strategy, precision
    strategy.param_dtype = param_dtype_of(precision)
    return strategy, "32-true"
