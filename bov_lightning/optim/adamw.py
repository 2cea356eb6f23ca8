"""AdamW in one pass over memory, for whole tensors and for rows of tables alike."""

from torch import Tensor
from torch.optim.adamw import adamw


def step_adamw(
    parameters: list[Tensor], gradients: list[Tensor], exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor], steps: list[Tensor], group: dict,
) -> None:  # fmt: skip
    """One step, in place, with PyTorch's fused kernel.

    Args:
        parameters: plain tensors on one device; gradients and moments have their shapes.
        steps: how many steps came before, a fp32 number for each; counted on.
        group: the optimizer's, with ``lr``, ``betas``, ``eps`` and ``weight_decay``.
    """
    beta1, beta2 = group["betas"]
    adamw(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs=[],
        state_steps=steps,
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )
