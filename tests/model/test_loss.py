"""The chunked loss equals the plain one and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bov_lightning.model import loss as loss_module
from bov_lightning.model.loss import softcap, softcapped_cross_entropy


@pytest.fixture
def small_chunks(monkeypatch):
    for kind in ("cpu", "cuda"):
        monkeypatch.setitem(loss_module.LOGITS_PER_CHUNK, kind, 50 * 7)


def inputs(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(4, 23, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator)
    targets = torch.randint(0, 50, (4, 23), generator=generator)
    targets[0, :5] = targets[3, -1] = -1
    x, weight = x.to(device, dtype).requires_grad_(), weight.to(device).requires_grad_()
    return x, weight, targets.to(device)


def plain(x, weight, targets, reduction="mean"):
    logits = softcap(F.linear(x, weight.to(x.dtype)).float())
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_equal_the_plain_ones(small_chunks, device, dtype, tolerance):
    x, weight, targets = inputs(dtype, device)
    expected = plain(x, weight, targets)
    (3 * expected).backward()
    expected_grads = [x.grad.clone(), weight.grad.clone()]
    x.grad = weight.grad = None
    found = softcapped_cross_entropy(x, weight, targets)
    (3 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    for grad, reference in zip([x.grad, weight.grad], expected_grads, strict=True):
        assert grad.dtype == reference.dtype
        assert (grad - reference).norm() < tolerance * 10 * reference.norm()


def test_losses_per_token_equal_the_plain_ones(small_chunks):
    x, weight, targets = inputs()
    found = softcapped_cross_entropy(x, weight, targets, "none")
    assert found.shape == targets.shape
    assert torch.allclose(found.flatten(), plain(x, weight, targets, "none"), atol=1e-5)
    assert (found[targets == -1] == 0).all()


def test_all_targets_ignored_is_no_division_by_zero():
    x, weight, targets = inputs()
    loss = softcapped_cross_entropy(x, weight, torch.full_like(targets, -1))
    loss.backward()
    assert loss.item() == 0
    assert x.grad.abs().max() == 0


def test_a_second_backward_pass_is_refused(small_chunks):
    """The gradients were computed with the loss and scaled in place."""
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = softcapped_cross_entropy(x, weight, torch.tensor([0, 1, 2]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute it again"):
        loss.backward()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_of_all_tokens_never_exist(monkeypatch, reduction):
    n_token, vocab_size, limit = 512, 1000, 64_000
    monkeypatch.setitem(loss_module.LOGITS_PER_CHUNK, "cpu", limit)
    x = torch.randn(n_token, 16, requires_grad=True)
    weight = torch.randn(vocab_size, 16, requires_grad=True)
    targets = torch.randint(0, vocab_size, (n_token,))
    with LargestTensor() as mode:
        loss = softcapped_cross_entropy(x, weight, targets, reduction)
        if reduction == "mean":
            loss.backward()
    assert vocab_size * 16 <= mode.largest <= limit
