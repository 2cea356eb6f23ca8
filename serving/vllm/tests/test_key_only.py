"""Pages that hold keys alone: the arithmetic against a dense oracle, and whole engines."""

import pytest
import torch
from bov_vllm import key_only_arithmetic as arithmetic
from bov_vllm.key_only_arithmetic import Scratch, attend_pages, requests_of, write_slots
from hypothesis import given, settings
from hypothesis import strategies as st


class Step:
    """Random requests in shuffled pages; the pages of nobody and the slots of no token are NaN."""

    def __init__(self, requests, heads, n_slot, head_dim=8, n_vocab=40, dtype=None, seed=0):
        """``requests``: pairs of new tokens and tokens in all."""
        generator = torch.Generator().manual_seed(seed)
        n_head, n_kv_head = heads
        self.requests, self.n_slot = requests, n_slot
        n_pages = [-(-n_token // n_slot) for _, n_token in requests]
        shape = (sum(n_pages) + 3, n_kv_head, head_dim, n_slot)
        self.pages = torch.full(shape, torch.nan, dtype=dtype)
        self.page_ids = torch.full((shape[0], n_slot), 2**30, dtype=torch.int32)
        self.table = torch.randn(n_vocab, n_kv_head * head_dim, generator=generator).to(dtype)
        order = torch.randperm(shape[0], generator=generator).int()
        self.page_table = torch.zeros(len(requests), max(n_pages) + 2, dtype=torch.int32)
        self.query_start, self.texts = [0], []
        for row, (n_new, n_token) in enumerate(requests):
            mine, order = order[: n_pages[row]], order[n_pages[row] :]
            self.page_table[row, : len(mine)] = mine
            keys = torch.randn(n_token, n_kv_head, head_dim, generator=generator).to(dtype)
            ids = torch.randint(0, n_vocab, (n_token,), generator=generator)
            position = torch.arange(n_token)
            slots = mine[position // n_slot].long() * n_slot + position % n_slot
            write_slots(keys, ids, slots, self.pages.mT, self.page_ids)
            self.texts.append((keys, ids))
            self.query_start.append(self.query_start[-1] + n_new)
        self.q = torch.randn(self.query_start[-1], n_head, head_dim, generator=generator).to(dtype)

    def attend(self, window, scale=0.7):
        """What is tested."""
        n_tokens = [n_token for _, n_token in self.requests]
        requests = requests_of(self.query_start, n_tokens, self.page_table, self.n_slot)
        out = torch.full_like(self.q, torch.nan)
        attend_pages(
            self.q, self.pages, self.page_ids, self.table, requests, window, scale, out, Scratch()
        )
        return out

    def dense(self, window, scale=0.7):
        """The oracle: whole score matrices in fp64."""
        outputs = []
        for (keys, ids), (n_new, n_token), start in zip(
            self.texts, self.requests, self.query_start[:-1], strict=True
        ):
            q = self.q[start : start + n_new].double()
            group = q.shape[1] // keys.shape[1]
            values = self.table[ids].double().unflatten(1, keys.shape[1:])
            keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
            score = torch.einsum("qhd,shd->hqs", q, keys) * scale
            distance = torch.arange(n_token - n_new, n_token)[:, None] - torch.arange(n_token)
            hidden = (distance < 0) | (distance > (n_token if window is None else window))
            weight = score.masked_fill(hidden, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqs,shd->qhd", weight, values))
        return torch.cat(outputs)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from([0, 1, 1, 2, 8, 9, 40]), st.integers(0, 90)),
        min_size=1,
        max_size=4,
    ),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    n_slot=st.sampled_from([1, 16, 32]),
    n_vocab=st.sampled_from([3, 50]),
    window=st.sampled_from([None, 0, 5, 33, 1000]),
    seed=st.integers(0, 9),
)
def test_paged_attention_equals_the_dense_one(requests, heads, n_slot, n_vocab, window, seed):
    """New tokens and tokens before them; few new ones and many; texts shorter than the table."""
    requests = [(n_new, n_new + before) for n_new, before in requests]
    step = Step(requests, heads, n_slot, n_vocab=n_vocab, seed=seed)
    assert torch.allclose(step.attend(window).double(), step.dense(window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("n_new", [1, 3, 30])
def test_long_pasts_go_in_pieces(monkeypatch, window, n_new):
    monkeypatch.setattr(arithmetic, "PIECE", 64)
    step = Step([(n_new, 500), (n_new, 64 + n_new)], (4, 2), 16)
    assert torch.allclose(step.attend(window).double(), step.dense(window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("n_new", [1, 4, 80])
def test_half_precision_is_as_near_as_its_rounding(window, n_new):
    step = Step([(n_new, 300)], (4, 2), 32, head_dim=16, dtype=torch.bfloat16)
    expected = step.dense(window)
    assert (step.attend(window) - expected).norm() < 6e-3 * expected.norm()
