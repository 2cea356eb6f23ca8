"""One Triton kernel: the loss of a chunk of logits and, in their place, its gradient.

Written out in PyTorch, the same takes about ninety bytes of memory traffic per logit, which at a
vocabulary of 32,768 is two fifths of the time of a small model's step on an H100; this reads each
twice and writes it once. `bov_lightning.model.loss` holds the same in PyTorch, which this is tested
against.
"""

import torch
from torch import Tensor

from bov_lightning.model.matmul import OPERATORS

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LOGITS_PER_PASS = 4096
"""Logits of a row that a program holds at a time."""

if triton is not None:

    @triton.jit
    def capped_loss_of_row(
        logits, targets, share, nats, row_stride, n_logit, cap,
        GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One row: nats of its target and, over its logits, their gradient times its share."""
        row = tl.program_id(0)
        start_of_row = logits + row.to(tl.int64) * row_stride
        target = tl.load(targets + row)
        counted = target >= 0
        # Read before anything is written over it.
        at_target = tl.load(start_of_row + tl.maximum(target, 0)).to(tl.float32)
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, n_logit, BLOCK):
            i = start + tl.arange(0, BLOCK)
            logit = tl.load(start_of_row + i, mask=i < n_logit, other=0.0).to(tl.float32)
            # tanh(z) = 2 sigmoid(2 z) - 1; bounded by the cap, so that exp cannot overflow.
            capped = 2 * tl.sigmoid(logit * (2 / cap)) - 1
            sums += tl.where(i < n_logit, tl.exp(cap * capped), 0.0)
        normaliser = tl.sum(sums, 0)
        capped_target = cap * (2 * tl.sigmoid(at_target * (2 / cap)) - 1)
        tl.store(nats + row, tl.where(counted, tl.log(normaliser) - capped_target, 0.0))
        if GRADIENT:
            weight = tl.load(share + row)
            for start in range(0, n_logit, BLOCK):
                i = start + tl.arange(0, BLOCK)
                logit = tl.load(start_of_row + i, mask=i < n_logit, other=0.0).to(tl.float32)
                capped = 2 * tl.sigmoid(logit * (2 / cap)) - 1
                gradient = tl.exp(cap * capped) * (weight / normaliser)
                gradient = tl.where(i == target, gradient - weight, gradient)
                gradient *= 1 - capped * capped
                stored = gradient.to(logits.dtype.element_ty)
                tl.store(start_of_row + i, stored, mask=i < n_logit)


# An operator, so that tracing and tensors without content stop here.
@torch.library.custom_op(f"{OPERATORS}::fused_capped_loss", mutates_args=("logits_NV",))
def fused_capped_loss(
    logits_NV: Tensor, targets_N: Tensor, share_N: Tensor, cap: float, gradient: bool
) -> Tensor:
    """Nats (N,) in fp32 of ``targets_N`` under logits soft-capped at ±``cap``; 0 where it is -1.

    With ``gradient``, the logits' memory afterwards holds the gradient of
    ``(share_N * nats).sum()``; ``share_N`` (fp32) is read then only, and is 0 where the target
    is -1.
    """
    nats_N = logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
    capped_loss_of_row[(len(logits_NV),)](
        logits_NV, targets_N, share_N, nats_N,
        logits_NV.stride(0), logits_NV.shape[1], cap,
        GRADIENT=gradient, BLOCK=LOGITS_PER_PASS, num_warps=8,
    )  # fmt: skip
    return nats_N


@fused_capped_loss.register_fake
def _(logits_NV, targets_N, share_N, cap, gradient):
    return logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
