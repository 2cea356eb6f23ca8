"""The small parts that every room of the network uses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without learned weight; eps is torch's for the dtype."""
    return F.rms_norm(x, (x.shape[-1],))


def uniform_(tensor: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    """Fills ``tensor`` uniformly from [-bound, bound]."""
    with torch.no_grad():
        return tensor.uniform_(-bound, bound, generator=generator)


class Linear(nn.Linear):
    """A linear layer without bias whose weight is filled by `Transformer.initialise` alone."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: the default initialisation would be overwritten at once."""
