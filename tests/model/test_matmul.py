"""Products by oneDNN and the rotation's own backward pass, against what they stand for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bov_lightning.model import matmul as products
from bov_lightning.model.attention import rotary_angles_at, rotate
from bov_lightning.model.layers import Linear
from bov_lightning.model.matmul import linear

sizes = st.integers(1, 40)


@pytest.fixture(autouse=True, scope="module")
def onednn():
    """Uses oneDNN whatever the processor, where there is one."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(products, "ONEDNN_IS_FASTER", True)
        yield


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


@settings(max_examples=20, deadline=None)
@given(batch=st.lists(st.integers(1, 5), min_size=1, max_size=3), d_in=sizes, d_out=sizes)
def test_values_and_gradients_are_those_of_a_linear_layer(batch, d_in, d_out):
    x, weight = random(*batch, d_in), random(d_out, d_in, seed=1)
    direction = random(*batch, d_out, seed=2).detach()
    found, expected = linear(x, weight), F.linear(x, weight)
    torch.testing.assert_close(found, expected)
    assert type(found.grad_fn) is not type(expected.grad_fn)  # another path is measured
    for got, due in zip(
        *(torch.autograd.grad((y * direction).sum(), (x, weight)) for y in (found, expected)),
        strict=True,
    ):
        torch.testing.assert_close(got, due, rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for_is_differentiated():
    x, weight = random(3, 8).detach(), random(4, 8)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(4, 8))
    frozen = F.linear(random(3, 8), weight.detach())
    assert type(linear(random(3, 8), weight.detach()).grad_fn) is type(frozen.grad_fn)


def test_autocast_and_other_dtypes_keep_their_product():
    x, weight = random(3, 8), random(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    half = linear(random(3, 8, dtype=torch.bfloat16), random(4, 8, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_layers_compute_the_same():
    torch.manual_seed(0)
    first, second = Linear(24, 40), Linear(40, 24)
    for layer in (first, second):
        torch.nn.init.normal_(layer.weight)
    x = random(2, 5, 24)

    def network(x: torch.Tensor) -> torch.Tensor:
        return second(F.relu(first(x)).square())

    leaves = (x, first.weight, second.weight)
    expected = torch.autograd.grad(network(x).square().sum(), leaves)
    found = torch.autograd.grad(torch.compile(network)(x).square().sum(), leaves)
    for got, due in zip(found, expected, strict=True):
        torch.testing.assert_close(got, due, rtol=1e-4, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(n_row=st.integers(1, 3), n_token=st.integers(1, 9), half=st.integers(1, 8))
def test_rotations_gradient_is_that_of_the_definition(n_row, n_token, half):
    x, direction = random(n_row, n_token, 2, 2 * half), random(n_row, n_token, 2, 2 * half, seed=1)
    cos, sin = rotary_angles_at(torch.arange(n_token), 2 * half)
    x1, x2 = x.chunk(2, dim=-1)
    by_token, turn = cos[..., :half], sin[..., :half]
    expected = torch.cat((x1 * by_token + x2 * turn, x2 * by_token - x1 * turn), dim=-1)
    found = rotate(x, cos, sin)
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad((y * direction).sum(), x, retain_graph=True)[0]
        for y in (found, expected)
    ]
    torch.testing.assert_close(*gradients)
