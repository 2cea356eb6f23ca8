"""Bits per byte: a loss that does not depend on the tokenizer."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class BitsPerByte(Metric):
    """Summed negative log-likelihood in bits over the UTF-8 bytes of the targets.

    Targets of 0 bytes (special tokens) count on neither side.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self):
        super().__init__()
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("nats", default=zero.clone(), dist_reduce_fx="sum")
        self.add_state("n_byte", default=zero.clone(), dist_reduce_fx="sum")

    def update(self, nats: Tensor, n_byte: Tensor) -> None:
        """
        Args:
            nats: negative log-likelihood per target, any shape.
            n_byte: UTF-8 bytes per target, the same shape.
        """
        self.nats += (nats.double() * (n_byte > 0)).sum()
        self.n_byte += n_byte.sum()

    def compute(self) -> Tensor:
        """Bits per byte, fp64; NaN without any byte."""
        return self.nats / math.log(2) / self.n_byte
