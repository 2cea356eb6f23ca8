"""The small parts that every room of the network uses."""

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bov_lightning.errors import UserError
from bov_lightning.model.matmul import linear


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without learned weight; eps is torch's for the dtype."""
    # On the meta device `bov plan` counts what a CPU needs.
    if x.requires_grad and x.device.type in ("cpu", "meta") and x.dtype == torch.float32:
        return _RMSNorm.apply(x)
    return F.rms_norm(x, (x.shape[-1],))


class _RMSNorm(torch.autograd.Function):
    """Half the time of torch's, which on a CPU is made of many passes over memory.

    It keeps its output, which the matrix that follows keeps anyway, unless autocast copies it.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(torch.finfo(x.dtype).eps).rsqrt_()
        # Squares beyond fp32 would train on as zeros: the guard must see them.
        scale.masked_fill_(scale == 0, torch.nan)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (grad * y).sum(dim=-1, keepdim=True).div_(-y.shape[-1])
        return torch.addcmul(grad, y, along).mul_(scale)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return _SquaredReLU.apply(x) if x.requires_grad else F.relu(x).square()


class _SquaredReLU(torch.autograd.Function):
    """Keeps one tensor for the backward pass and reads memory once; a third of autograd's time."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, positive, value=2)


class Initialiser:
    """Fills parameters, each from its own random stream, which is named after it.

    Numbers are drawn in fp32 on the CPU whatever the device, so that they are the same everywhere,
    and handed to ``write``, which may keep only a part of them.
    """

    def __init__(self, seed: int, write: Callable[[Tensor, Tensor], None] = Tensor.copy_):
        """``write(parameter, whole)`` stores a tensor of the parameter's shape."""
        self.seed, self.write = seed, write
        self._filled: set[int] = set()

    def has_filled(self, tensor: Tensor) -> bool:
        """Whether that very parameter or buffer has been filled."""
        return id(tensor) in self._filled

    def stream(self, name: str) -> torch.Generator:
        """The random stream of that name."""
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def fill(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """Stores ``whole``, which has the parameter's shape, and returns it."""
        if whole.shape != parameter.shape:
            raise UserError(
                f"a parameter of shape {tuple(parameter.shape)} cannot be filled with numbers of "
                f"shape {tuple(whole.shape)}"
            )
        self.write(parameter, whole)
        self._filled.add(id(parameter))
        return whole

    def constant(self, parameter: Tensor, value: float) -> Tensor:
        """The same number everywhere."""
        return self.fill(parameter, torch.full(parameter.shape, float(value), device="cpu"))

    def normal(self, name: str, parameter: Tensor, deviation: float) -> Tensor:
        """From a normal distribution around 0."""
        draw = torch.empty(parameter.shape, device="cpu")
        return self.fill(parameter, draw.normal_(0, deviation, generator=self.stream(name)))

    def uniform(self, name: str, parameter: Tensor, low: float, high: float) -> Tensor:
        """Uniformly from [low, high]."""
        draw = torch.empty(parameter.shape, device="cpu")
        return self.fill(parameter, draw.uniform_(low, high, generator=self.stream(name)))


class Linear(nn.Linear):
    """A linear layer without bias whose weight is filled by `Transformer.initialise` alone."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def reset_parameters(self) -> None:
        """Nothing: the default initialisation would be overwritten at once."""
