"""The small parts that every room of the network uses."""

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without learned weight; eps is torch's for the dtype."""
    return F.rms_norm(x, (x.shape[-1],))


class Initialiser:
    """Fills parameters, each from its own random stream, which is named after it.

    Numbers are drawn in fp32 on the CPU whatever the device, so that they are the same everywhere,
    and handed to ``write``, which may keep only a part of them.
    """

    def __init__(self, seed: int, write: Callable[[Tensor, Tensor], None] = Tensor.copy_):
        """``write(parameter, whole)`` stores a tensor of the parameter's shape."""
        self.seed, self.write = seed, write

    def stream(self, name: str) -> torch.Generator:
        """The random stream of that name."""
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def fill(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """Stores ``whole`` and returns it."""
        self.write(parameter, whole)
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

    def reset_parameters(self) -> None:
        """Nothing: the default initialisation would be overwritten at once."""
