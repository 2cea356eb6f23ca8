"""Attention against a loop-free definition written out in full."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bov_lightning.model.attention import (
    _document_block_mask,
    _window_block_mask,
    attend,
    make_masks,
    rotary_angles_at,
    rotate,
)


def mask_of(window, n_token):
    return make_masks([window], torch.zeros(1, n_token, dtype=torch.int64), None)[window]


def naive(q, k, v, window):
    """softmax(1.44 q.k / sqrt(D)) v over the visible keys, heads repeated by hand."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = 1.44 * q @ k.mT / q.shape[-1] ** 0.5
    i = torch.arange(q.shape[2], device=q.device)
    hidden = (i[:, None] < i) | (i[:, None] - i > (q.shape[2] if window is None else window))
    return score.masked_fill(hidden, -torch.inf).softmax(-1) @ v


@settings(max_examples=30, deadline=None)
@given(
    n_token=st.integers(1, 70),
    window=st.one_of(st.none(), st.integers(0, 80)),
    n_kv_head=st.sampled_from([1, 2, 4]),
)
def test_attend_equals_its_definition(n_token, window, n_kv_head):
    generator = torch.Generator().manual_seed(n_token)
    q = torch.randn(2, 4, n_token, 8, generator=generator)
    k, v = torch.randn(2, 2, n_kv_head, n_token, 8, generator=generator).unbind()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found, expected = attend(*inputs, mask_of(window, n_token)), naive(*inputs, window)
    assert torch.allclose(found, expected, atol=1e-5)
    direction = torch.randn(found.shape, generator=generator)
    gradients = [torch.autograd.grad((y * direction).sum(), inputs) for y in (found, expected)]
    for x_grad, y_grad in zip(*gradients, strict=True):
        assert torch.allclose(x_grad, y_grad, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("n_token", "window"), [(256, 64), (300, 100), (128, None)])
def test_windows_and_documents_on_the_device_equal_their_definition(device, n_token, window):
    """On a GPU windows and documents go to FlexAttention, everything else to SDPA."""
    generator = torch.Generator().manual_seed(n_token)
    q = torch.randn(2, 4, n_token, 32, generator=generator)
    k, v = torch.randn(2, 2, 2, n_token, 32, generator=generator).unbind()
    inputs = [x.to(device).requires_grad_() for x in (q, k, v)]
    direction = torch.randn(q.shape, generator=generator).to(device)
    ids = torch.ones(2, n_token, dtype=torch.int64)
    ids[0, [0, n_token // 3]] = 0
    for start in (None, 0):
        mask = make_masks([window], ids.to(device), start)[window]
        found = attend(*inputs, mask)
        if start is None:
            expected = naive(*inputs, window)
        else:
            # The first row is two documents, the second is one.
            cut = n_token // 3
            parts = [naive(*(x[:1, :, part] for x in inputs), window)
                     for part in (slice(0, cut), slice(cut, None))]  # fmt: skip
            whole = naive(*(x[1:] for x in inputs), window)
            expected = torch.cat((torch.cat(parts, dim=2), whole))
        assert torch.allclose(found, expected, atol=1e-4)
        gradients = [torch.autograd.grad((y * direction).sum(), inputs) for y in (found, expected)]
        for x_grad, y_grad in zip(*gradients, strict=True):
            assert torch.allclose(x_grad, y_grad, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("n_token", "window"), [(64, 10), (300, 128), (256, 255)])
def test_flex_attention_hides_what_the_mask_hides(n_token, window):
    """The CUDA path's mask, run by FlexAttention's eager CPU forward."""
    from torch.nn.attention.flex_attention import flex_attention

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, n_token, 16, generator=generator)
    k, v = torch.randn(2, 1, 2, n_token, 16, generator=generator).unbind()
    ids = torch.randint(0, 20, (1, n_token), generator=generator)
    document = (ids == 0).cumsum(1)
    for block_mask, start in (
        (_window_block_mask(n_token, window, torch.device("cpu")), None),
        (_document_block_mask(document, window), 0),
    ):
        flex = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True, scale=1.44 / 4)
        mask = make_masks([window], ids, start)[window]
        assert torch.allclose(flex, attend(q, k, v, mask), atol=1e-5)


def test_masks_made_while_validating_serve_training():
    q = torch.randn(1, 1, 37, 8, requires_grad=True)
    with torch.inference_mode():
        attend(q.detach(), q.detach(), q.detach(), mask_of(5, 37))
    attend(q, q, q, mask_of(5, 37)).sum().backward()
    assert q.grad is not None


def test_rotation_depends_on_distance_alone():
    cos, sin = rotary_angles_at(torch.arange(50), 16)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 50, 1, 16).unbind()
    score = rotate(q, cos, sin)[0, :, 0] @ rotate(k, cos, sin)[0, :, 0].T
    for distance in (0, 7):
        diagonal = score.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
