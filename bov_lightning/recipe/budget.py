"""How long a budget trains, and how a batch is divided."""

from bov_lightning.errors import UserError
from bov_lightning.kinds import ENDLESS
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.counting import flops_per_token, scaling_parameters
from bov_lightning.recipe.sections import BudgetConfig


def horizon(budget: BudgetConfig, config: TransformerConfig, batch_tokens: int) -> int:
    """Optimizer steps that the budget pays for, rounded to the nearest; at least 1."""
    if budget.steps is not None:
        return budget.steps
    if budget.flops is not None:
        tokens = budget.flops / flops_per_token(config)
    elif budget.tokens is not None:
        tokens = budget.tokens
    else:
        tokens = budget.tokens_per_param * scaling_parameters(config)
    steps = max(1, round(tokens / batch_tokens))
    if steps > ENDLESS:
        raise UserError(f"model.budget pays for {steps:.1e} steps: at most {ENDLESS:,}")
    return steps


def accumulation(batch_tokens: int, micro: int, sequence_len: int, world_size: int) -> int:
    """Micro-steps per optimizer step; a batch that cannot be divided is a `UserError`."""
    chunk = micro * sequence_len * world_size
    if batch_tokens % chunk == 0 and batch_tokens > 0:
        return batch_tokens // chunk
    below = batch_tokens // chunk * chunk
    nearest = [str(n) for n in (below, below + chunk) if n > 0]
    raise UserError(
        f"batch.tokens {batch_tokens} is not divisible by batch.micro {micro} x sequence_len "
        f"{sequence_len} x {world_size} device{'s' if world_size > 1 else ''} = {chunk}: the "
        f"nearest that are: {' and '.join(nearest)}"
    )
