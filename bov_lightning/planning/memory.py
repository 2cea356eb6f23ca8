"""Memory per device, by simulation.

The network, its sharding and its optimizer run through a micro-step and an optimizer step on
tensors without content, while every storage is counted from its birth to its end. What torch
allocates is thus known exactly, whatever the variant. It leaves out what torch does not allocate:
the CUDA context, the communication library's own buffers, and what the caching allocator loses to
fragmentation. torch.compile keeps less than the operations that it fuses, so that its runs need
somewhat less.

Where nothing is sharded, the tensors are on the meta device. FSDP2 and autocast ask for the device
and get fake ones (`FakeTensorMode`), in a group of processes that do not exist; these give the same
numbers, but import torch's compiler and take several times as long.
"""

import gc
import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode

from bov_lightning.distributed.host_tables import banks_of
from bov_lightning.distributed.layout import Layout
from bov_lightning.distributed.sharding import (
    gathered_once,
    local_part,
    make_mesh,
    recompute_activations,
    shard,
)
from bov_lightning.model import attention, layers, loss, matmul, transformer
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.counting import meta_model
from bov_lightning.model.ngrams import rows_per_token
from bov_lightning.model.offload import HostTable
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim import muon_adamw
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW
from bov_lightning.recipe.sections import Recipe

KINDS = ("parameters", "gradients", "optimizer", "tables", "activations", "buffers")
"""``tables``: value tables with their gradients and optimizer state, which the first three leave
out. ``activations``: what the forward pass makes, also while it is recomputed. ``buffers``:
gathered parameters, messages, and temporaries of the backward pass, the loss and the optimizer; on
one device in half precision also the gradients that micro-steps add up (`gathered_once`)."""
PARTS = {
    "forward": "forward pass", "backward": "backward pass", "optimizer": "optimizer step",
}  # fmt: skip
"""Of a step: what ``peak_in`` says, in words."""


def plan_memory(recipe: Recipe, layout: Layout, n_micro: int) -> dict[str, Any]:
    """Bytes on one device: the most of each of `KINDS`, and ``peak``, the most at one time.

    The kinds do not have their most at the same time; ``peak_in`` is the part of the step in which
    the peak is: ``forward``, ``backward`` or ``optimizer``.

    Args:
        recipe: what is trained.
        layout: on what.
        n_micro: micro-steps per optimizer step.
    """
    collects = gc.isenabled()
    # The result must not depend on when Python looks for cycles; it also takes a fifth of the time.
    gc.disable()
    _forget_masks()
    kind = "cuda" if layout.cuda else "cpu"
    logits = dict.fromkeys(loss.LOGITS_PER_CHUNK, loss.LOGITS_PER_CHUNK[kind])
    if layout.shards or layout.half:
        simulated = _fake_ranks(layout)
    else:
        simulated = _meta_device(recipe.activation_checkpointing)
    try:
        with (
            patch.dict(loss.LOGITS_PER_CHUNK, logits),
            patch.object(loss, "_takes_kernel", lambda x: layout.cuda),
            patch.object(loss, "_fused", _fused_loss),
            # Which library multiplies changes no size.
            patch.object(matmul, "ONEDNN_IS_FASTER", False),
            _as_on_cuda() if layout.cuda else nullcontext(),
            simulated as world,
        ):
            return _simulate(recipe, layout, n_micro, *world)
    finally:
        _forget_masks()  # they are tensors without content now
        if collects:
            gc.enable()


def _fused_loss(logits_NV: Tensor, targets_N: Tensor, share_N: Tensor, gradient: bool) -> Tensor:
    """The memory of the kernel, whose compiler need not be here."""
    return logits_NV.new_empty(len(logits_NV), dtype=torch.float32)


def _forget_masks() -> None:
    attention._window_mask.cache_clear()
    attention._band_mask.cache_clear()


@contextmanager
def _meta_device(recomputes: bool) -> Iterator[tuple[str, Any, "_StorageTracker"]]:
    """Device, mesh and tracker of a simulation in which nothing is sharded."""
    with (
        # Checkpointing looks at the compiler's settings.
        nullcontext() if recomputes else _without_compiler(),
        # Autocast does not know the device.
        patch.object(torch, "is_autocast_enabled", lambda device_type: False),
        # It would choose the one that keeps the probabilities, unlike CPUs and GPUs.
        patch.object(F, "scaled_dot_product_attention", _fused_attention),
    ):
        yield "meta", None, _StorageTracker(None)


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Keeps torch from importing its compiler just to tell it what not to compile.

    That import takes as long as all of `bov plan` besides.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    marked = []

    def disable(function: Any, *args, **kwargs) -> Any:
        marked.append(function)
        return function

    stub = ModuleType("torch._dynamo")
    stub.disable = disable
    sys.modules[stub.__name__] = stub
    try:
        with patch.object(torch, "_dynamo", stub, create=True):
            yield
    finally:
        del sys.modules[stub.__name__]
        # Else the compiler would not know later what was kept from it.
        for function in marked:
            vars(function).pop("__dynamo_disable", None)


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What F.scaled_dot_product_attention does on a CPU, which reads grouped heads as they are."""
    if attn_mask is not None:
        shut = torch.scalar_tensor(-torch.inf, dtype=q.dtype, device=q.device)
        open_ = torch.scalar_tensor(0.0, dtype=q.dtype, device=q.device)
        attn_mask = torch.where(attn_mask, open_, shut)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=is_causal, attn_mask=attn_mask, scale=scale
    )[0]


@contextmanager
def _fake_ranks(layout: Layout) -> Iterator[tuple[str, Any, "_StorageTracker"]]:
    """Device, mesh and tracker of one rank among others that do not exist."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("the simulation needs a process group of its own")
    exchange = "torch.distributed.tensor.placement_types.shard_dim_alltoall"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    try:
        mesh = make_mesh("cpu", layout.world_size, layout.replicate)
        # Slicing a mesh looks at numbers, which tensors without content do not have.
        shard_mesh = mesh if layout.replicate == 1 else mesh["shard"]
        with (
            patch.object(muon_adamw, "_shard_mesh", lambda tensor: shard_mesh),
            # Without it, CPU meshes gather everything.
            patch(exchange, _all_to_all) if layout.cuda else nullcontext(),
            FakeTensorMode() as fake_mode,
        ):
            yield "cpu", mesh, _StorageTracker(fake_mode)
    finally:
        dist.destroy_process_group()


def _all_to_all(local: Tensor, gather_dim: int, shard_dim: int, mesh: Any, mesh_dim: int) -> Tensor:
    group = mesh.get_group(mesh_dim).group_name
    return torch.ops._dtensor.shard_dim_alltoall(local, gather_dim, shard_dim, group)


def _simulate(
    recipe: Recipe, layout: Layout, n_micro: int, device: str, mesh: Any, tracker: "_StorageTracker"
) -> dict[str, Any]:
    config = recipe.model.config
    dtype = torch.bfloat16 if layout.half else None
    model = _empty_model(config, device)
    if recipe.tables_on == "host":
        _fetch_rows(model, dtype if layout.sharded else None, tracker)
    if recipe.activation_checkpointing:
        recompute_activations(model)
    if layout.shards:
        shard(model, mesh, dtype)
    groups = build_groups(model, recipe.model.optimizer, config, recipe.batch.tokens)
    optimizer = MuonAdamW(groups)
    optimizer.create_state()

    for group in optimizer.param_groups:
        is_table = group["name"] == "table"
        for p in group["params"]:
            p.grad = torch.zeros_like(p)  # of the micro-step before
            tracker.label([p], "tables" if is_table else "parameters")
            tracker.label([p.grad], "tables" if is_table else "gradients")
            tracker.label(optimizer.state[p].values(), "tables" if is_table else "optimizer")
            p.register_post_accumulate_grad_hook(
                lambda p, kind="tables" if is_table else "gradients": tracker.label([p.grad], kind)
            )
    use_autocast = layout.half and not layout.sharded
    with tracker:
        # DDP's messages are copies of all gradients.
        messages = [] if layout.sharded else [torch.empty_like(p) for p in model.parameters()]
        tracker.label(messages, "gradients")
        shape = (recipe.batch.micro, config.sequence_len + 1)
        rows = torch.zeros(shape, dtype=torch.int64, device=device)

        def micro_step(is_first: bool) -> None:
            tracker.phase = "forward"
            with torch.autocast(device, dtype) if use_autocast else nullcontext():
                mean_loss = model(rows[:, :-1], rows[:, 1:])
            if is_first:
                optimizer.zero_grad()  # after the forward pass, as Lightning does it
            tracker.phase = "backward"
            mean_loss.backward()

        alone = layout.shards and layout.world_size == 1
        if alone:  # as the first forward pass does it, one after the other
            for module in model.modules():
                if hasattr(module, "unshard"):
                    module.unshard()
            tracker.label(model.parameters(), "buffers")
        if alone and n_micro > 1:
            with gathered_once(model, 1):
                micro_step(is_first=True)
            micro_step(is_first=False)
        else:
            micro_step(is_first=n_micro == 1)
        tracker.phase = "optimizer"
        optimizer.step()
    return {**{kind: tracker.most[kind] for kind in KINDS}, **tracker.peak}


def host_memory(recipe: Recipe, layout: Layout, n_micro: int) -> dict[str, int]:
    """Bytes of one process in the host's memory that value tables take there (tables_on: host).

    ``tables``: its rows with their moments and counts; ``gradients``: of the rows that a step
    touches, at most; ``checkpoint``: the copy that is written, kept where the device is a GPU.
    """
    model, config = meta_model(recipe.model.config), recipe.model.config
    banks = banks_of(model)
    n_row, width = banks[0][1].table.shape
    n_token = n_micro * recipe.batch.micro * config.sequence_len
    n_touched = min(n_row, n_token * math.prod(rows_per_token(model.lookup_source, "meta")))
    n_own = -(-n_row // layout.world_size)
    tables = 4 * len(banks) * n_own * (3 * width + 1)
    gradients = 4 * len(banks) * n_touched * width
    return {"tables": tables, "gradients": gradients, "checkpoint": tables}


class _FetchedRows(HostTable):
    """What a table in the host's memory has on the device: at most a row for each that is read."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype | None, tracker: "_StorageTracker"):
        (self.n_row, self.width), self.dtype, self.tracker = shape, dtype, tracker

    def begin(self, row_ids: Tensor) -> None:
        """The rows of a micro-step."""
        self.inverse = torch.zeros_like(row_ids)
        n_row = min(self.n_row, row_ids.numel())
        self.rows = torch.empty(n_row, self.width, dtype=self.dtype, device=row_ids.device)
        self.tracker.label([self.rows], "tables")
        self.rows.requires_grad_().register_post_accumulate_grad_hook(
            lambda rows: self.tracker.label([rows.grad], "tables")
        )

    def look_up(self, row_ids: Tensor, like: Tensor) -> Tensor:
        """As `bov_lightning.distributed.host_tables.TrainedTable` does."""
        return F.embedding(self.inverse, self.rows)


def _fetch_rows(model: Transformer, dtype: torch.dtype | None, tracker: "_StorageTracker") -> None:
    """Has a model look its rows up in tables that are not on the device."""
    tables = []
    for _, bank in banks_of(model):
        tables.append(_FetchedRows(bank.table.shape, dtype, tracker))
        bank.offload(tables[-1])

    def fetch(row_ids: Tensor) -> None:
        for table in tables:
            table.begin(row_ids)

    model.fetch_rows = fetch


def _empty_model(config: TransformerConfig, device: str) -> Transformer:
    """The network with parameters that nobody has filled."""
    model = meta_model(config)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(p.shape, device=device)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    return model


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Lets the simulation, which runs on CPU tensors, take the ways that a GPU would.

    Fake tensors could say that they are on a GPU, but FSDP2 asks it for streams.
    """

    def no_masks(windows: list[int | None], *what_is_hidden) -> dict:
        # What FlexAttention keeps is what attention without a mask keeps.
        return dict.fromkeys(windows)

    with (
        patch.object(transformer, "make_masks", no_masks),
        # Fused on a GPU: as layer_norm, it keeps its input and a number or two per row.
        patch.object(F, "rms_norm", F.layer_norm),
        patch.object(layers._RMSNorm, "apply", lambda x: F.layer_norm(x, x.shape[-1:])),
    ):
        yield


class _StorageTracker(TorchDispatchMode):
    """Counts the bytes of all living storages that operations make, by kind.

    torch.distributed._tools.mem_tracker does the same by module, but knows neither value tables nor
    DTensors' gradients.
    """

    def __init__(self, fake_mode: Any):
        """``fake_mode``: the FakeTensorMode that it counts in, if any."""
        super().__init__()
        self.fake_mode = fake_mode
        self.phase = "forward"
        self.in_function = False
        """Whether an autograd.Function of the network runs forwards, which it does without grad."""
        self.live: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.peak = {"peak": 0, "peak_in": self.phase}
        self.known: dict[int, tuple[str, int, weakref.ref]] = {}
        """Kind and size by the id of a storage."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; to say so would import the compiler."""
        return False

    def __enter__(self) -> "_StorageTracker":
        original = torch.UntypedStorage.resize_

        # FSDP2 frees and refills the memory of gathered parameters without any operation.
        def resize(storage: torch.UntypedStorage, size: int) -> None:
            original(storage, size)
            if size and active_fake_mode() is self.fake_mode:
                self._set(storage, "buffers")
            elif id(storage) in self.known:
                self._set(storage, self.known[id(storage)][0])

        # Written in Python or in C, as the version has it.
        apply = vars(torch.autograd.Function)["apply"]

        def watched(function: type[torch.autograd.Function], *args) -> Any:
            outside = self.in_function
            # The loss keeps nothing but gradients.
            self.in_function = torch.is_grad_enabled() and function is not loss._MeanCrossEntropy
            try:
                return apply.__get__(None, function)(*args)
            finally:
                self.in_function = outside

        self._patches = ExitStack()
        self._patches.enter_context(patch.object(torch.UntypedStorage, "resize_", resize))
        self._patches.enter_context(
            patch.object(torch.autograd.Function, "apply", classmethod(watched))
        )
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        self._patches.close()
        super().__exit__(*exception)

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Says what the tensors' memory is for."""
        for tensor in tensors:
            self._set(local_part(tensor).untyped_storage(), kind)

    def _set(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = id(storage)
        if key in self.known:
            self._forget(key)
        size = storage.nbytes()
        self.known[key] = (kind, size, weakref.ref(storage, lambda _: self._forget(key)))
        self.live[kind] += size
        self.most[kind] = max(self.most[kind], self.live[kind])
        if (total := self.live.total()) > self.peak["peak"]:
            self.peak = {"peak": total, "peak_in": self.phase}

    def _forget(self, key: int) -> None:
        kind, size, _ = self.known.pop(key)
        self.live[kind] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # half of all calls
        if any(cls.__name__ == "DTensor" for cls in types):
            return NotImplemented  # see the operations on its local tensor instead
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # the optimizer looks at the gradients' norm and the step
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if active_fake_mode() is not self.fake_mode:
            return result  # DTensor tries out shapes in a mode of its own
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.known:
                    self._set(storage, self._kind(func, args))
        return result

    def _kind(self, func, args: tuple) -> str:
        forwards = torch.is_grad_enabled() or self.in_function
        if not forwards or func.namespace not in ("aten", "prims"):
            return "buffers"
        source = args[0] if args else None
        if func is torch.ops.aten._to_copy.default and isinstance(source, Tensor):
            # Autocast's copies of the parameters.
            kind = self.known.get(id(source.untyped_storage()), ("activations",))[0]
            return "activations" if kind == "activations" else "buffers"
        return "activations"
