"""Bits per byte as defined, whatever the batches."""

import math

import pytest
import torch

from evaluation.bits_per_byte import BitsPerByte


def test_bits_per_byte_is_summed_before_it_is_divided():
    nats = torch.rand(5, 7)
    n_byte = torch.randint(0, 4, (5, 7))
    expected = (nats * (n_byte > 0)).sum() / math.log(2) / n_byte.sum()
    metric = BitsPerByte()
    for i in range(5):
        metric.update(nats[i], n_byte[i])
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-6)


def test_uniform_predictions_over_bytes_cost_eight_bits():
    metric = BitsPerByte()
    metric.update(torch.full((3, 4), math.log(256)), torch.ones(3, 4, dtype=torch.int32))
    assert metric.compute().item() == pytest.approx(8)


def test_special_tokens_count_on_neither_side():
    metric = BitsPerByte()
    metric.update(torch.tensor([100.0, math.log(2)]), torch.tensor([0, 1]))
    assert metric.compute().item() == pytest.approx(1)
