"""How fast each arm of a ladder trains: steps in turn, on one thread of a CPU that is alone."""

import statistics
import time
from collections.abc import Sequence

import torch

from bov_lightning.console import say
from bov_lightning.launch.ladder import LadderRuns
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW
from bov_lightning.recipe.ladder import LadderArm, LadderRung
from bov_lightning.recipe.sections import Recipe
from bov_lightning.report.ladder_results import Speed


class _Stepper:
    """Training steps of a recipe on text that does not matter."""

    def __init__(self, recipe: Recipe, device: torch.device):
        config, batch = recipe.model.config, recipe.batch
        self.device, self.n_row = device, batch.tokens // config.sequence_len
        self.micro, self.vocab_size = batch.micro, config.vocab_size
        self.sequence_len = config.sequence_len
        self.model = Transformer(config, 0).to(device)
        groups = build_groups(self.model, recipe.model.optimizer, config, batch.tokens)
        self.optimizer = MuonAdamW(groups)

    def step(self) -> float:
        """Seconds of one optimizer step, with all its micro-steps."""
        started, n_micro = time.perf_counter(), self.n_row // self.micro
        for _ in range(n_micro):
            shape = (self.micro, self.sequence_len + 1)
            rows = torch.randint(self.vocab_size, shape, device=self.device)
            (self.model(rows[:, :-1], rows[:, 1:]) / n_micro).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


def measure(
    runs: LadderRuns, rung: LadderRung, arms: Sequence[LadderArm], n_round: int, device: str = "cpu"
) -> list[Speed]:
    """The arms' speeds on a rung, by steps that take turns; the first round does not count."""
    n_thread = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steppers = [_Stepper(runs.given_of(rung, arm).recipe, torch.device(device)) for arm in arms]
        times: list[list[float]] = [[] for _ in arms]
        for _ in range(n_round + 1):
            for stepper, taken in zip(steppers, times, strict=True):
                taken.append(stepper.step())
    finally:
        torch.set_num_threads(n_thread)
    found = []
    for arm, taken in zip(arms, times, strict=True):
        seconds = statistics.median(taken[1:])
        flops = runs.plan_of(rung, arm)["flops_per_token"] * rung.batch
        found.append(Speed(rung.name, arm.name, seconds, flops / seconds, rung.batch / seconds,
                           n_round))  # fmt: skip
    return found


def measure_all(runs: LadderRuns) -> list[Speed]:
    """All that the ladder's file asks for, each rung with all arms that it has."""
    ladder, found = runs.ladder, []
    for name in ladder.speed.rungs:
        arms = [arm for arm in ladder.arms if ladder.seeds(arm.name, name)]
        here = measure(runs, ladder.rung(name), arms, ladder.speed.rounds)
        for speed in here:
            say(f"{name} {speed.arm}: {speed.tokens_per_second:,.0f} tokens/s, "
                f"{speed.flops_per_second:.3g} FLOPs/s on one thread of a CPU")  # fmt: skip
        found += here
    return found
