"""The loss in one Triton kernel equals PyTorch's, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'bov-lightning[triton]'")

from bov_lightning.model import loss, loss_kernel

pytestmark = pytest.mark.gpu


def material(n_row, n_logit, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n_logit)
    logits = 20 * torch.randn(n_row, n_logit, generator=generator)
    targets = torch.randint(0, n_logit, (n_row,), generator=generator)
    targets[:2] = torch.tensor([n_logit - 1, -1])
    share = torch.rand(n_row, generator=generator) * (targets >= 0)
    return logits.to(device, dtype), targets.to(device), share.to(device)


@pytest.mark.parametrize("n_logit", [7, 300, 4096, 9001])
@pytest.mark.parametrize("strided", [False, True])
def test_the_kernel_equals_the_reference(monkeypatch, device, n_logit, strided):
    monkeypatch.setattr(loss_kernel, "LOGITS_PER_PASS", 1024)
    logits, targets, share = material(5, n_logit, device)
    monkeypatch.setattr(loss, "_takes_kernel", lambda logits: False)
    nats, gradient = loss._nats_and_gradient(logits.clone(), targets, share[:, None], True)
    if strided:
        room = torch.full((5, n_logit + 3), 9.0, device=device)
        room[:, :n_logit] = logits
        logits = room[:, :n_logit]
    before = logits.clone()
    alone = loss_kernel.fused_capped_loss(logits, targets, share, loss.SOFTCAP, False)
    assert torch.equal(logits, before)
    found = loss_kernel.fused_capped_loss(logits, targets, share, loss.SOFTCAP, True)
    torch.testing.assert_close(found[:, None], nats, rtol=1e-5, atol=2e-5)
    assert torch.equal(alone, found)
    torch.testing.assert_close(logits, gradient, rtol=1e-4, atol=1e-7)
    assert not strided or (room[:, n_logit:] == 9).all()


def test_half_precision_is_summed_in_fp32(device):
    """And rounded once; the interpreter cuts off instead."""
    logits, targets, share = material(3, 2000, device, torch.bfloat16)
    exact = logits.float()
    nats = loss_kernel.fused_capped_loss(logits, targets, share, loss.SOFTCAP, True)
    expected = loss_kernel.fused_capped_loss(exact, targets, share, loss.SOFTCAP, True)
    assert torch.allclose(nats, expected, atol=1e-5)
    torch.testing.assert_close(logits.float(), exact, rtol=2**-7, atol=1e-30)


def test_the_loss_takes_the_kernel_in_pieces(monkeypatch, device):
    """The whole loss, its gradients and its nats per token, with and without it."""
    monkeypatch.setitem(loss.LOGITS_PER_CHUNK, "cuda", 50 * 7)
    monkeypatch.setitem(loss.LOGITS_PER_CHUNK, "cpu", 50 * 7)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=generator).to(device) for shape in ((23, 16), (50, 16))]
    x, weight = (leaf.requires_grad_() for leaf in leaves)
    targets = torch.randint(-1, 50, (23,), generator=generator).to(device)
    found = []
    for kernel in (False, True):
        monkeypatch.setattr(loss, "_takes_kernel", lambda logits, kernel=kernel: kernel)
        mean = loss.softcapped_cross_entropy(x, weight, targets)
        each = loss.softcapped_cross_entropy(x, weight, targets, "none")
        found.append([mean.detach(), each, *torch.autograd.grad(2 * mean, (x, weight))])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
