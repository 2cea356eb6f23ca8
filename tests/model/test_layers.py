"""Layers with gradients of their own, against autograd's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bov_lightning.model.layers import rms_norm, squared_relu

ORACLES = {
    rms_norm: lambda x: x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt(),
    squared_relu: lambda x: F.relu(x).square(),
}


@settings(max_examples=20, deadline=None)
@given(
    layer=st.sampled_from(list(ORACLES)),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
)
def test_values_and_gradients_are_those_of_the_definition(layer, shape, scale):
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, *shape, generator=generator).unbind()
    x = (scale * x).requires_grad_()
    found, expected = layer(x), ORACLES[layer](x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad((y * direction).sum(), x)[0] for y in (found, expected)]
    # The terms of a gradient, which may cancel out, are as large as direction * y / x.
    terms = (direction * found / x).detach().nan_to_num()
    largest = float(torch.stack((*gradients, terms)).abs().max())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.parametrize("layer", ORACLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_inference_compute_the_same(layer, dtype):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(layer(x.clone().requires_grad_()), layer(x), rtol=1e-6, atol=1e-6)
