"""A step of fixed shapes gives what any step gives; on a GPU it is captured."""

import pytest
import torch
from variants import KINDS, OVERLAYS, WAYS, make_model, mostly_slow, perturb, token_ids

from bov_lightning.errors import UserError
from bov_lightning.inference.decoding import Decoding
from bov_lightning.inference.graph import StaticStep, StaticSteps, why_not_static
from bov_lightning.inference.sampling import Sampling
from bov_lightning.model.offload import MemoryTable
from bov_lightning.model.values import BankOfValues


def model_of(name: str, **shape):
    return perturb(make_model(OVERLAYS[name], **shape), smear=0.9)


def continued(model, prompts, sampling, **options) -> list[list[int]]:
    decoding = Decoding(model, prompts, sampling, **options)
    while any(decoding.running):
        decoding.step()
    return decoding.new


@pytest.mark.gpu
@pytest.mark.parametrize("name", mostly_slow(WAYS, KINDS))
def test_static_steps_choose_the_same_tokens(name, device):
    """Prompts of several lengths, one row beyond its window of 128 before another, one that ends
    early because the context is full."""
    model = model_of(name).to(device)
    prompts = [
        ids[:n].tolist() for ids, n in zip(token_ids(135, n_row=3), (5, 120, 135), strict=True)
    ]
    greedy = Sampling(15, temperature=0)
    sampled = Sampling(8, temperature=0.9, top_k=20)
    for sampling in (greedy, sampled) if name == "bov" else (greedy,):
        options = {"sampling": sampling, "max_context": 145}
        assert continued(model, prompts, static=True, **options) == continued(
            model, prompts, static=False, **options
        )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [pytest.param({}, marks=pytest.mark.slow), {"document_start": 0}])
def test_batches_take_turns_with_one_step(shape, device):
    """What was captured for a batch serves the next of its size; a longer one gets more room."""
    model = model_of("bigram_bank", **shape).to(device)
    steps = StaticSteps(model)
    sampling, taken = Sampling(5, temperature=0), []
    for n in (200, 3, 150, 520, 9):
        prompts = token_ids(n).tolist()
        decoding = Decoding(model, prompts, sampling, static=steps)
        while any(decoding.running):
            decoding.step()
        assert decoding.new == continued(model, prompts, sampling, static=False)
        taken.append(decoding.cache)
    assert taken[0] is taken[1] is taken[2] is not taken[3] is taken[4]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, marks=[pytest.mark.slow] * (i != 1 or j != 1))
        for i, name in enumerate(("standard", "bov", "first_layer_every"))
        for j, shape in enumerate(({"window_pattern": "L"}, {"document_start": 0}, {}))
    ],
)
@torch.no_grad()
def test_static_and_other_steps_take_turns_on_one_cache(name, shape):
    """Rows that get no token stay what they were, however full their room is."""
    model = model_of(name, **shape)
    ids = 1 + token_ids(160, n_row=3, vocab_size=69)
    ids[0, [0, 90, 128]] = ids[2, 150] = 0
    expected = model(ids)
    cache = model.new_cache(3, 160)
    step = StaticStep(model, cache)
    seen = [0, 0, 0]

    def check(logits, rows):
        for row in rows:
            found, wanted = logits[row], expected[row, seen[row] - 1]
            assert torch.allclose(found, wanted, atol=1e-4), (row, seen)

    def any_step(lengths):
        piece = torch.zeros(3, max(lengths), dtype=torch.int64)
        for row, n in enumerate(lengths):
            piece[row, :n] = ids[row, seen[row] : seen[row] + n]
            seen[row] += n
        logits = model(piece, cache=cache, lengths=torch.tensor(lengths))
        last = torch.tensor(lengths).clamp(min=1) - 1
        check(logits[torch.arange(3), last], [row for row, n in enumerate(lengths) if n])

    def static_steps(n, rows):
        for _ in range(n):
            token = torch.stack([ids[row, min(seen[row], 159)] for row in range(3)])[:, None]
            logits = step(token, [row in rows for row in range(3)])
            for row in rows:
                seen[row] += 1
            check(logits, rows)

    static_steps(2, {0, 1, 2})
    any_step([100, 0, 120])
    static_steps(25, {0, 2})
    any_step([1, 1, 1])
    static_steps(12, {1, 2})
    assert cache._lengths == cache.lengths.tolist() == seen == [128, 15, 160]
    static_steps(20, {0, 1})
    branch = cache.select([2, 0])
    assert branch.lengths.tolist() == [160, 148]
    static_steps(12, {0, 1})
    assert seen == [160, 47, 160]


@torch.no_grad()
def test_wrong_use_is_refused(monkeypatch):
    model = model_of("bov")
    cache = model.new_cache(2, 3)
    step = StaticStep(model, cache)
    token = torch.ones(2, 1, dtype=torch.int64)
    for ids, advances, words in (
        (token[:1], None, "holds 2 rows"),
        (token, [True], "holds 2 rows"),
        (token.expand(2, 2), None, "one token of each"),
        (70 * token, None, "token id 70"),
    ):
        with pytest.raises(UserError, match=words):
            step(ids, advances)
    for _ in range(3):
        step(token)
    with pytest.raises(UserError, match="4 tokens do not fit into a context of 3"):
        step(token, [False, True])
    assert step(token, [False, False]).shape == (2, 70)
    assert cache.lengths.tolist() == [3, 3]
    monkeypatch.setattr(BankOfValues, "capturable", False)
    with pytest.raises(UserError, match="no static step: value.source bank says"):
        StaticStep(model, model.new_cache(2, 3))
    assert not why_not_static(model_of("standard").new_cache(2, 3))


@pytest.mark.parametrize("name", ["bov", "bov_add_context"])
@torch.no_grad()
def test_tables_on_the_host_are_read_by_other_steps(name):
    model = model_of(name)
    for block in model.blocks:
        source = block.attention.value.source
        if isinstance(source, BankOfValues):
            source.offload(MemoryTable(source.table.detach(), torch.device("cpu")))
    assert "bank_device" in why_not_static(model.new_cache(2, 3))


@pytest.mark.gpu
@torch.no_grad()
def test_a_captured_step_waits_for_nothing(device):
    """On a GPU, torch itself refuses to wait; on a CPU there is nobody to wait for."""
    model, ids = model_of("bov").to(device), token_ids(140).to(device)
    cache = model.new_cache(2, 200)
    expected = model(ids)
    logits = model(ids[:, :100], cache=cache)
    step = StaticStep(model, cache)
    step(ids[:, 100:101])
    if device.type == "cuda":
        assert step._graph is not None
        torch.cuda.set_sync_debug_mode("error")
    try:
        kept = [step(ids[:, n : n + 1]).clone() for n in range(101, 130)]
        logits = model(ids[:, 130:131], cache=cache)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(torch.stack(kept, dim=1), expected[:, 101:130], atol=1e-4)
    assert torch.allclose(logits[:, 0], expected[:, 130], atol=1e-4)
