"""Matrix products for training, by the faster of the CPU's two libraries.

PyTorch multiplies fp32 matrices on x86 with MKL, which runs its 256-bit kernels on AMD processors
even where these have 512-bit ones. oneDNN, which PyTorch carries too, uses what there is.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def _onednn_is_faster() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return False
    with info.open() as file:
        return "AuthenticAMD" in file.read(200)


ONEDNN_IS_FASTER = _onednn_is_faster()
"""Whether this processor is one of AMD's with AVX-512."""


def _is_fp32_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` (..., I) times the transpose of ``weight`` (O, I); nothing that autograd knows."""
    if not (ONEDNN_IS_FASTER and _is_fp32_on_cpu(x)):
        return F.linear(x, weight)
    if torch.compiler.is_compiling():
        return _multiply_when_compiled(x, weight)
    return _multiply_by_onednn(x, weight)


def _multiply_by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


OPERATORS = f"bov_{hashlib.sha256(__name__.encode()).hexdigest()[:16]}"
"""Where this module's operator is registered. The file of an exported model holds this code too and
needs one of its own; its module may be called after any folder, so the name itself is none."""


# The compiler takes oneDNN's own operator for constant weights only.
@torch.library.custom_op(
    f"{OPERATORS}::multiply", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def _multiply_when_compiled(x: Tensor, weight: Tensor) -> Tensor:
    return _multiply_by_onednn(x, weight)


@_multiply_when_compiled.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As `torch.nn.functional.linear`, under autograd and autocast too."""
    if (
        ONEDNN_IS_FASTER
        and weight.requires_grad
        and torch.is_grad_enabled()
        and _is_fp32_on_cpu(x)
        and _is_fp32_on_cpu(weight)
        and not torch.is_autocast_enabled("cpu")
        # What is exported runs where this module is not: it holds torch's operators alone.
        and not torch.compiler.is_exporting()
    ):
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        # Flat, as the backward pass needs it: the compiler would make a second one.
        flat = x.flatten(0, -2)
        ctx.save_for_backward(flat, weight)
        return multiply(flat, weight).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        x_grad = multiply(flat, weight.T) if ctx.needs_input_grad[0] else None
        if x_grad is not None:
            x_grad = x_grad.view(*grad.shape[:-1], weight.shape[1])
        # MKL is as fast as oneDNN where the sum runs over rows.
        return x_grad, flat.T @ x if ctx.needs_input_grad[1] else None
