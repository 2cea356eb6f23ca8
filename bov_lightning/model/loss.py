"""Soft-capped cross-entropy that never holds the logits of all tokens at once.

Shapes: N tokens, C = d_model, V = vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bov_lightning.model.matmul import multiply

SOFTCAP = 15.0
IGNORED = -1
LOGITS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**27}
"""How many logits exist at once: what a CPU's cache holds in fp32, 256 MiB in bf16 on a GPU."""


def softcap(logits: Tensor) -> Tensor:
    """Bounds logits smoothly to ±15."""
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def softcapped_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean"
) -> Tensor:
    """Negative log-likelihood in nats of ``targets`` under soft-capped logits ``x @ weight.T``.

    Args:
        x: (..., C), the normed output of the last block.
        weight: (V, C).
        targets: (...), int64; -1 is not counted.
        reduction: ``mean`` over the counted targets (a scalar), or ``none``: the shape of
            ``targets``, 0 where not counted, without gradient.
    """
    # Autocast does not reach into an autograd.Function: choose the matmul dtype here.
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    flat_x, flat_targets = x.flatten(0, -2), targets.flatten()
    if reduction == "mean":
        return _MeanCrossEntropy.apply(flat_x, weight, flat_targets)
    if reduction == "none":
        return _token_losses(flat_x, weight, flat_targets).view(targets.shape)
    raise ValueError(f"reduction {reduction!r}: use mean or none")


def _chunks(x_NC: Tensor, weight_VC: Tensor) -> list[slice]:
    n_logit = LOGITS_PER_CHUNK["cpu" if x_NC.device.type == "cpu" else "cuda"]
    size = max(1, n_logit // len(weight_VC))
    return [slice(start, start + size) for start in range(0, len(x_NC), size)]


def _takes_kernel(x: Tensor) -> bool:
    if not x.is_cuda:
        return False
    # Its compiler takes seconds to import.
    from bov_lightning.model.loss_kernel import triton

    return triton is not None


def _fused(logits_NV: Tensor, targets_N: Tensor, share_N: Tensor, gradient: bool) -> Tensor:
    from bov_lightning.model.loss_kernel import fused_capped_loss

    return fused_capped_loss(logits_NV, targets_N, share_N, SOFTCAP, gradient)


@torch.no_grad()
def _token_losses(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    weight = weight_VC.to(x_NC.dtype)
    losses = []
    for rows in _chunks(x_NC, weight):
        logits, targets = F.linear(x_NC[rows], weight), targets_N[rows]
        if _takes_kernel(logits):
            losses.append(_fused(logits, targets, logits.new_empty(0, dtype=torch.float32), False))
            continue
        capped = softcap(logits.float())
        losses.append(F.cross_entropy(capped, targets, ignore_index=IGNORED, reduction="none"))
    return torch.cat(losses)


def _nats_and_gradient(
    logits_NV: Tensor, targets_N: Tensor, share_N1: Tensor, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Nats of the counted targets, and the gradient of ``(share * nats).sum()`` in the logits.

    The memory of the logits may be written over.
    """
    if _takes_kernel(logits_NV):
        nats = _fused(logits_NV, targets_N, share_N1.flatten(), wants_gradient)
        return nats, logits_NV if wants_gradient else None
    index, seen = targets_N.clamp(min=0)[:, None], (targets_N != IGNORED)[:, None]
    # tanh(z) = 2 sigmoid(2 z) - 1, which is several times as fast on a CPU.
    twice = logits_NV.float().mul_(2 / SOFTCAP)
    capped = twice.sigmoid_().mul_(2).sub_(1)
    # No maximum to subtract: soft-capped logits cannot overflow exp.
    probability = (SOFTCAP / math.log(2) * capped).exp2_()
    normaliser = probability.sum(dim=-1, keepdim=True)
    nats = (normaliser.log() - SOFTCAP * capped.gather(1, index)) * seen
    if not wants_gradient:
        return nats, None
    # d loss / d logit = (softmax - onehot) * (1 - tanh^2).
    probability.mul_(share_N1 / normaliser).scatter_add_(1, index, -share_N1)
    gradient = torch.addcmul(probability, probability, capped.square_(), value=-1)
    return nats, gradient.to(logits_NV.dtype)


class _MeanCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits are at hand.

    So nothing of the size of the logits is kept, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
        weight = weight_VC.to(x_NC.dtype)
        counted = (targets_N != IGNORED).sum().clamp(min=1)
        total = torch.zeros((), dtype=torch.float32, device=x_NC.device)
        x_grad = torch.empty_like(x_NC) if ctx.needs_input_grad[0] else None
        weight_grad = (
            torch.zeros_like(weight_VC, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        for rows in _chunks(x_NC, weight):
            x, target = x_NC[rows], targets_N[rows]
            share = (target != IGNORED)[:, None] / counted
            wants_gradient = x_grad is not None or weight_grad is not None
            nats, grad = _nats_and_gradient(multiply(x, weight), target, share, wants_gradient)
            total += nats.sum()
            if x_grad is not None:
                x_grad[rows] = multiply(grad, weight.T)
            if weight_grad is not None:
                if x.dtype == weight_grad.dtype:
                    weight_grad.addmm_(grad.T, x)
                else:
                    weight_grad += grad.T @ x
        ctx.gradients = x_grad, weight_grad
        ctx.weight_dtype = weight_VC.dtype
        return total / counted

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        # Scaled where they lie: the weight's is the largest tensor of a small model's step.
        (x_grad, weight_grad), ctx.gradients = ctx.gradients, (None, None)
        if x_grad is None and weight_grad is None:
            raise RuntimeError("the loss was differentiated before: compute it again")
        return (
            None if x_grad is None else x_grad.mul_(grad_output.to(x_grad.dtype)),
            None if weight_grad is None else weight_grad.mul_(grad_output).to(ctx.weight_dtype),
            None,
        )
