"""A GPU without one: fake tensors that say they are on it, and a watch on who waits for it.

Fake tensors compute shapes and devices alone. Mixing two devices is an error, as it is on a GPU.
A build of torch without CUDA has no such device for autograd: there, what is written in C++ takes
them for tensors on the meta device, and only Python, which decides in this project, sees "cuda".
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch._dynamo  # before anything of it is patched
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bov_lightning.model import attention, decode, kernels

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
SHAPES_FROM_NUMBERS = {
    aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.repeat_interleave, aten.bincount, aten.equal, aten.is_nonzero,
}  # fmt: skip
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_}


class Watch(TorchDispatchMode):
    """Notes the operations after or before which the host waits for the GPU, and all that run."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.operations: set[str] = set()
        self._pinned: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", func)
        self.operations.add(str(packet))
        if kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = CUDA
        if packet is aten.is_pinned:
            return False
        if packet is aten._pin_memory:
            self._pinned.append(aten.clone(args[0]))
            return self._pinned[-1]
        if packet is aten._local_scalar_dense and args[0].is_cuda:
            self.waits.append("item")
            return 1.0 if args[0].is_floating_point() else 1
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if packet in SHAPES_FROM_NUMBERS and any(x.is_cuda for x in tensors):
            self.waits.append(packet.__name__)
        if packet in INDEXED and args[0].is_cuda:
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self.waits.append("an index that is a mask")
            if not all(x.is_cuda for x in indices):
                self.waits.append("an index on the CPU")
        result = func(*args, **kwargs)
        if packet in COPIES:
            source = args[0] if packet is aten._to_copy else args[1]
            if source.is_cuda != result.is_cuda and not self._is_asynchronous(packet, args, kwargs):
                self.waits.append("a copy to the CPU" if source.is_cuda else "a copy to the GPU")
        return result

    def _is_asynchronous(self, packet, args: tuple, kwargs: dict) -> bool:
        source = args[0] if packet is aten._to_copy else args[1]
        is_said = kwargs.get("non_blocking", len(args) > 2 and args[2])
        return is_said and any(source is x for x in self._pinned)


def _dense_flex_attention(q_BHTD, k_BKTD, v_BKTD, block_mask, scale, enable_gqa):
    """FlexAttention's result: a dense mask of the same rule."""
    query = torch.arange(q_BHTD.shape[2], device=q_BHTD.device)[:, None]
    key = torch.arange(k_BKTD.shape[2], device=q_BHTD.device)
    assert block_mask.kv_indices.device == q_BHTD.device
    seen = [block_mask.mask_mod(row, 0, query, key) for row in range(block_mask.shape[0])]
    return torch.nn.functional.scaled_dot_product_attention(
        q_BHTD, k_BKTD, v_BKTD,
        attn_mask=torch.stack(seen)[:, None], scale=scale, enable_gqa=enable_gqa,
    )  # fmt: skip


def _make_subclass(cls, elem, requires_grad=False, **_):
    return _torchs_make_subclass(cls, elem, requires_grad)


_torchs_make_subclass = Tensor._make_subclass


@contextmanager
def fake_gpu() -> Iterator[Watch]:
    """Within it, tensors on "cuda" can be made and computed with. What Triton and the compiler
    would make for a GPU runs in PyTorch instead."""
    cached = [attention._window_mask, attention._window_block_mask, attention._band_mask]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "_make_subclass", staticmethod(_make_subclass))
        patch.setattr(FakeTensor, "is_cuda", property(lambda x: x.device.type == "cuda"))
        patch.setattr(attention, "_compiled_flex_attention", lambda: _dense_flex_attention)
        patch.setattr(kernels, "attend_fused", decode.attend_bag)
        patch.setattr(kernels, "attend_kept", attention.attend)
        for function in cached:
            function.cache_clear()
        try:
            # Backward passes in this thread: there is no GPU whose thread could run them.
            with (
                FakeTensorMode(allow_non_fake_inputs=False),
                Watch() as watch,
                torch.autograd.set_multithreading_enabled(False),
            ):
                yield watch
        finally:
            FakeTensorMode.cache_clear()
            for function in cached:
                function.cache_clear()
