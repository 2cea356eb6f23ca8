"""The optimizer against the rule written out for one matrix, and against torch's AdamW."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bov_lightning.optim import muon_adamw
from bov_lightning.optim.muon_adamw import POLAR_EXPRESS, MuonAdamW, polar_express


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "cols"), [(48, 48), (96, 32), (32, 96)])
def test_bf16_products_in_fp32_are_the_same_products(device, rows, cols, monkeypatch):
    """Processors without bf16 products take another path; one iteration rounds as the other."""
    stack = torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for slowly in (True, False):
        monkeypatch.setattr(muon_adamw, "_multiplies_slowly", lambda x, slowly=slowly: slowly)
        found.append(polar_express(stack).float())
    exact = polar_express(stack, torch.float32)
    rounding = (found[1] - exact).norm()
    assert (found[0] - found[1]).norm() <= rounding
    assert rounding < 0.1 * exact.norm()


def muon_group(parameters, **settings):
    group = {"kind": "muon", "params": parameters, "lr": 0.02, "momentum": 0.95, "beta2": 0.9}
    # fp32 instead of bf16, whose rounding would hide mistakes; parity tests cover bf16.
    return group | {"weight_decay": 0.1, "dtype": torch.float32} | settings


def reference_step(p, g, m, s, lr, mu, beta2, wd):
    """One step for one matrix, as the paper's notes write it; changes p, m and s."""
    rows, cols = p.shape
    m += (1 - mu) * (g - m)
    u = g + mu * (m - g)
    x = u / (1.01 * u.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        if rows > cols:
            gram = x.T @ x
            x = a * x + x @ (b * gram + c * (gram @ gram))
        else:
            gram = x @ x.T
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    dim, n = (1, cols) if rows >= cols else (0, rows)
    v = x.square().mean(dim, keepdim=True)
    w = (n * v.sum()).sqrt()
    s += (1 - beta2) * (v - s)
    r = s.clamp(min=1e-10).rsqrt()
    w2 = (n * (v * r**2).sum()).sqrt()
    x = x * r * w / w2.clamp(min=1e-10)
    lr = lr * max(1.0, rows / cols) ** 0.5
    p -= lr * x + lr * wd * p * (x * p >= 0)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(1, 40), n=st.integers(1, 3))
def test_muon_follows_the_rule(rows, cols, n):
    generator = torch.Generator().manual_seed(rows * 41 + cols)

    def draw():
        return torch.randn(rows, cols, generator=generator)

    parameters = [torch.nn.Parameter(draw()) for _ in range(n)]
    start = [p.detach().clone() for p in parameters]
    expected = [p.clone() for p in start]
    momenta = [torch.zeros(rows, cols) for _ in parameters]
    averaged = (rows, 1) if rows >= cols else (1, cols)
    moments = [torch.zeros(averaged) for _ in parameters]
    optimizer = MuonAdamW([muon_group(parameters, weight_decay=1.0)])
    for _ in range(3):
        for i, p in enumerate(parameters):
            p.grad = draw()
            reference_step(expected[i], p.grad, momenta[i], moments[i], 0.02, 0.95, 0.9, 1.0)
        optimizer.step()
    for i, p in enumerate(parameters):
        update = expected[i] - start[i]
        # Products that are summed in another order are rounded to another bf16 number now and then,
        # which the iteration carries on, furthest for matrices that are nearly square: 1.5%.
        assert (p - expected[i]).norm() < 5e-2 * update.norm()
        assert torch.allclose(optimizer.state[p]["momentum"], momenta[i], atol=1e-6)
        assert torch.allclose(optimizer.state[p]["second_moment"], moments[i], rtol=1e-3)


def test_adamw_equals_torchs():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(5, 3), (1,)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings_ = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.05}
    optimizer = MuonAdamW([{"kind": "adamw", "params": ours, **settings_}])
    reference = torch.optim.AdamW(theirs, **settings_)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_zero_gradients_and_zero_lr_change_nothing():
    """How distributed checkpoints create the state that they then fill."""
    matrix, vector = (torch.nn.Parameter(torch.randn(6, 4)) for _ in range(2))
    before = matrix.detach().clone(), vector.detach().clone()
    adamw = {"kind": "adamw", "params": [vector], "lr": 0.0, "betas": (0.9, 0.9), "eps": 1e-10}
    optimizer = MuonAdamW([muon_group([matrix], lr=0.0), adamw])
    matrix.grad, vector.grad = torch.zeros(6, 4), torch.zeros(6, 4)
    optimizer.step()
    assert torch.equal(matrix, before[0])
    assert torch.equal(vector, before[1])
    assert set(optimizer.state[matrix]) == {"momentum", "second_moment"}


def test_state_survives_a_round_trip():
    def run(n_before: int, n_after: int) -> torch.Tensor:
        p = torch.nn.Parameter(torch.ones(4, 3))
        generator = torch.Generator().manual_seed(0)
        optimizer = MuonAdamW([muon_group([p])])
        for i in range(n_before + n_after):
            if i == n_before:
                state = optimizer.state_dict()
                optimizer = MuonAdamW([muon_group([p])])
                optimizer.load_state_dict(state)
            p.grad = torch.randn(4, 3, generator=generator)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(5, 0), run(2, 3))


def test_muon_refuses_vectors_and_unknown_kinds():
    with pytest.raises(ValueError, match="matrices"):
        MuonAdamW([muon_group([torch.nn.Parameter(torch.ones(3))])])
    with pytest.raises(ValueError, match="kind"):
        MuonAdamW([{"kind": "sgd", "params": [torch.nn.Parameter(torch.ones(3))]}])
