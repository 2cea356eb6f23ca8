"""Learning rate, momentum and weight decay at the points that the paper's rules fix."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.muon_adamw import MuonAdamW
from bov_lightning.optim.schedule import (
    TrainingSchedule,
    lr_factor,
    muon_momentum,
    weight_decay_factor,
)

PAPER = OptimizerConfig()


def test_points_of_the_papers_schedule():
    n, start = 3766, 3766 - round(0.65 * 3766)
    assert lr_factor(0, n, PAPER) == 1 / 40
    assert lr_factor(39, n, PAPER) == 1
    assert lr_factor(start, n, PAPER) == 1
    assert lr_factor(n, n, PAPER) == pytest.approx(0.05)
    assert lr_factor((start + n) // 2, n, PAPER) == pytest.approx(0.525, abs=1e-3)
    assert muon_momentum(0, n, PAPER) == 0.85
    assert muon_momentum(200, n, PAPER) == pytest.approx(0.91)
    assert muon_momentum(400, n, PAPER) == 0.97
    assert muon_momentum(n, n, PAPER) == pytest.approx(0.90)
    assert weight_decay_factor(0, n) == 1
    assert weight_decay_factor(n // 2, n) == pytest.approx(0.5)
    assert weight_decay_factor(n, n) == pytest.approx(0)


@given(n=st.integers(1, 5000), part=st.floats(0, 1))
def test_factors_stay_within_bounds(n, part):
    step = round(part * n)
    assert 0 < lr_factor(step, n, PAPER) <= 1
    assert 0.85 <= muon_momentum(step, n, PAPER) <= 0.97
    assert 0 <= weight_decay_factor(step, n) <= 1


def settings_over(n_step: int, restart_at: int | None) -> list[tuple]:
    matrix, vector = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))

    def build():
        groups = [
            {"kind": "muon", "params": [matrix], "lr": 0.1, "momentum": 0.95, "beta2": 0.9,
             "weight_decay": 0.2},
            {"kind": "adamw", "params": [vector], "lr": 0.3, "betas": (0.9, 0.9), "eps": 1e-10,
             "weight_decay": 0.01},
        ]  # fmt: skip
        optimizer = MuonAdamW(groups)
        return optimizer, TrainingSchedule(optimizer, n_step, PAPER)

    optimizer, schedule = build()
    seen = []
    for step in range(n_step):
        if step == restart_at:
            states = optimizer.state_dict(), schedule.state_dict()
            optimizer, schedule = build()
            optimizer.load_state_dict(states[0])
            schedule.load_state_dict(states[1])
        muon, adamw = optimizer.param_groups
        seen.append((muon["lr"], muon["momentum"], muon["weight_decay"], adamw["lr"]))
        assert adamw["weight_decay"] == 0.01
        matrix.grad, vector.grad = torch.ones(3, 2), torch.ones(3)
        optimizer.step()
        schedule.step()
    return seen


def test_schedule_sets_every_group_and_resumes_exactly():
    whole = settings_over(60, None)
    assert whole == settings_over(60, 25)
    assert whole[0] == pytest.approx((0.1 / 40, 0.85, 0.2, 0.3 / 40))
    decay = 0.2 * (1 + math.cos(math.pi * 10 / 60)) / 2
    assert whole[10] == pytest.approx((0.1 * 11 / 40, 0.853, decay, 0.3 * 11 / 40))
