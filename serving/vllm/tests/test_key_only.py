"""Pages that hold keys alone: the arithmetic against a dense oracle, and whole engines."""

import pytest
import torch
from engines import TOLERANCE, engine, worst_difference
from hypothesis import given, settings
from hypothesis import strategies as st
from material import make_model, make_prompts, write_export

from bov_vllm import key_only
from bov_vllm import key_only_arithmetic as arithmetic
from bov_vllm.key_only import attend_by_vllm, best_for_many
from bov_vllm.key_only_arithmetic import (
    Scratch,
    attend_in_pieces,
    attend_pages,
    requests_of,
    write_slots,
)
from bov_vllm.model import kind_of_pages


class Step:
    """Random requests in shuffled pages; the pages of nobody and the slots of no token are NaN."""

    def __init__(
        self, requests, heads, n_slot, head_dim=8, n_vocab=40, dtype=None, seed=0, weights=None
    ):
        """``requests``: pairs of new tokens and tokens in all; ``weights``: of a value's rows."""
        self.weights, each = weights, () if weights is None else (len(weights),)
        generator = torch.Generator().manual_seed(seed)
        n_head, n_kv_head = heads
        self.requests, self.n_slot = requests, n_slot
        n_pages = [-(-n_token // n_slot) for _, n_token in requests]
        shape = (sum(n_pages) + 3, n_kv_head, head_dim, n_slot)
        kept = torch.float16 if dtype == torch.bfloat16 else dtype
        self.pages = torch.full(shape, torch.nan, dtype=kept)
        self.page_ids = torch.full((shape[0], n_slot, *each), 2**30, dtype=torch.int32)
        self.table = torch.randn(n_vocab, n_kv_head * head_dim, generator=generator).to(dtype)
        order = torch.randperm(shape[0], generator=generator).int()
        self.page_table = torch.zeros(len(requests), max(n_pages) + 2, dtype=torch.int32)
        self.query_start, self.texts = [0], []
        for row, (n_new, n_token) in enumerate(requests):
            mine, order = order[: n_pages[row]], order[n_pages[row] :]
            self.page_table[row, : len(mine)] = mine
            keys = torch.randn(n_token, n_kv_head, head_dim, generator=generator).to(dtype)
            ids = torch.randint(0, n_vocab, (n_token, *each), generator=generator)
            position = torch.arange(n_token)
            slots = mine[position // n_slot].long() * n_slot + position % n_slot
            write_slots(keys, ids, slots, self.pages.mT, self.page_ids)
            self.texts.append((keys, ids))
            self.query_start.append(self.query_start[-1] + n_new)
        self.q = torch.randn(self.query_start[-1], n_head, head_dim, generator=generator).to(dtype)

    def attend(self, window, scale=0.7, many=None):
        """What is tested; ``many`` as in `attend_pages`."""
        n_tokens = [n_token for _, n_token in self.requests]
        requests = requests_of(self.query_start, n_tokens, self.page_table, self.n_slot)
        out = torch.full_like(self.q, torch.nan)
        attend_pages(
            self.q, self.pages, self.page_ids, self.table, requests, window, scale, out, Scratch(),
            many, self.weights,
        )  # fmt: skip
        return out

    def dense(self, window, scale=0.7):
        """The oracle: whole score matrices in fp64."""
        outputs = []
        for (keys, ids), (n_new, n_token), start in zip(
            self.texts, self.requests, self.query_start[:-1], strict=True
        ):
            q = self.q[start : start + n_new].double()
            group = q.shape[1] // keys.shape[1]
            values = self.table[ids].double()
            if self.weights is not None:
                values = (values * torch.tensor(self.weights)[:, None].double()).sum(1)
            values = values.unflatten(1, keys.shape[1:])
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
    weights=st.sampled_from([None, None, (1.0, 1.0), (0.5, -1.0, 2.0)]),
    sums=st.booleans(),
    seed=st.integers(0, 9),
)
def test_paged_attention_equals_the_dense_one(
    requests, heads, n_slot, n_vocab, window, weights, sums, seed
):
    """New tokens and tokens before them; few new ones and many; texts shorter than the table; one
    row of it to a value and several; weights of equal rows summed where it pays, and never."""
    requests = [(n_new, n_new + before) for n_new, before in requests]
    step = Step(requests, heads, n_slot, n_vocab=n_vocab, seed=seed, weights=weights)
    with pytest.MonkeyPatch.context() as patch:
        if not sums:
            patch.setattr(arithmetic, "SOME_NEW", (0, 0))
        found = step.attend(window)
    assert torch.allclose(found.double(), step.dense(window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("n_new", [1, 3, 30])
def test_long_pasts_go_in_pieces(monkeypatch, window, n_new):
    monkeypatch.setattr(arithmetic, "PIECE", 64)
    monkeypatch.setattr(arithmetic, "SOME_NEW", (0, 0))
    step = Step([(n_new, 500), (n_new, 64 + n_new)], (4, 2), 16)
    assert torch.allclose(step.attend(window).double(), step.dense(window), atol=1e-5)


@pytest.mark.parametrize("weights", [None, (0.5, -1.0)])
@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("scale", [0.7, 60.0])
def test_weights_of_equal_rows_are_summed(monkeypatch, scale, window, weights):
    """Two heads at a time; scores whose powers fp32 does not hold."""
    monkeypatch.setattr(arithmetic, "SCORES", 2 * 112 * 80)
    step = Step([(40, 100), (40, 90)], (8, 4), 16, n_vocab=9, weights=weights)

    def never(*given):
        raise AssertionError("another way was taken")

    found = step.attend(window, scale, many=never)
    assert torch.allclose(found.double(), step.dense(window, scale), atol=1e-4)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("n_new", [1, 4, 80])
def test_half_precision_is_as_near_as_its_rounding(window, n_new):
    step = Step([(n_new, 300)], (4, 2), 32, head_dim=16, dtype=torch.bfloat16)
    expected = step.dense(window)
    assert (step.attend(window) - expected).norm() < 6e-3 * expected.norm()


@pytest.mark.parametrize("window", [None, 0, 40, 150])
@pytest.mark.parametrize(("heads", "weights"), [((4, 4), None), ((6, 2), None), ((6, 2), (1, 0.3))])
def test_prefill_by_vllms_kernel_equals_the_dense_one(monkeypatch, window, heads, weights):
    """Chunks within a text and at its start, in one step; scratch memory is used again."""
    monkeypatch.setattr(arithmetic, "SOME_NEW", (0, 0))
    requests = [(9, 9), (30, 200), (96, 160), (1, 70), (33, 64)]
    step = Step(requests, heads, 32, head_dim=64, weights=weights)
    found = step.attend(window, many=attend_by_vllm)
    assert torch.allclose(found.double(), step.dense(window), atol=1e-5)
    half = Step(requests, heads, 64, head_dim=32, dtype=torch.bfloat16)
    expected = half.dense(window)
    assert (half.attend(window, many=attend_by_vllm) - expected).norm() < 1e-2 * expected.norm()


def test_vllms_kernel_is_asked_for_pages_that_it_takes():
    assert best_for_many(32, 64) is attend_by_vllm
    assert best_for_many(16, 64) is attend_in_pieces is best_for_many(32, 80)


@pytest.mark.parametrize(
    ("overlay", "share"),
    [("bov", 2 / 6), pytest.param("bov_second_half", 3 / 6, marks=pytest.mark.slow)],
)
def test_as_many_more_blocks_as_theory_says(overlay, share, tmp_path):
    """1 / (1 - f/2) where a share f of the layers has a bank; key-only is what is not chosen."""
    model = make_model(overlay)
    blocks = {}
    for name, chosen in {"stored": {"bov_values": "stored"}, "default": {}}.items():
        export = write_export(model, tmp_path / name, **chosen)
        with engine(export, kv_cache_memory_bytes=2**22 * 15) as served:
            blocks[name] = served.pages.num_blocks
    assert blocks["default"] == pytest.approx(blocks["stored"] / (1 - share / 2), abs=1)


def test_windows_keep_values_unless_told_otherwise():
    shapes = {pattern: make_model("bov", pattern).config for pattern in ("L", "S", "SSSL")}
    kinds = {pattern: kind_of_pages(shape, None) for pattern, shape in shapes.items()}
    assert kinds == {"L": "keys", "S": "stored", "SSSL": "stored"}
    assert kind_of_pages(shapes["SSSL"], "keys") == "keys"


def no_ids(monkeypatch):
    """Ids are not written beside the keys."""
    write = key_only.write_slots

    def forgetful(key, ids, *where):
        write(key, None, *where)

    monkeypatch.setattr(key_only, "write_slots", forgetful)


def late_ids(monkeypatch):
    """Ids are written when all layers have read them."""
    write, due = key_only.write_slots, []

    def late(key, ids, *where):
        if ids is not None:
            while due:
                due.pop()()
            due.append(lambda: write(key.clone(), ids, *where))
        write(key, None, *where)

    monkeypatch.setattr(key_only, "write_slots", late)


def window_off_by_one(monkeypatch):
    """One token too many is seen."""
    attend = key_only.attend_pages

    def wide(q, pages, ids, table, requests, window, *rest):
        attend(q, pages, ids, table, requests, None if window is None else window + 1, *rest)

    monkeypatch.setattr(key_only, "attend_pages", wide)


@pytest.mark.parametrize("mistake", [no_ids, late_ids, window_off_by_one], ids=lambda f: f.__name__)
def test_a_mistake_is_found(mistake, monkeypatch, tmp_path):
    """What the matrix of `test_model` would say if it were made."""
    model = make_model("bov_every_layer", "SSSL")
    export = write_export(model, tmp_path / "export", bov_values="keys")
    mistake(monkeypatch)
    with engine(export, max_num_batched_tokens=96) as served:
        outputs = served.answer(make_prompts()[3:8], n_new=4)
    assert worst_difference(model, outputs) > 10 * TOLERANCE


@torch.inference_mode()
def test_bf16_differs_no_more_than_our_own_cache(tmp_path):
    """From the network's own whole forward pass in bf16, in prompts and in what follows."""
    model = make_model("bov_every_layer").to(torch.bfloat16)
    export = write_export(model, tmp_path / "export", bov_values="keys")
    with engine(export, dtype="bfloat16", max_num_batched_tokens=96) as served:
        outputs = served.answer(make_prompts()[3:9], n_new=20, prompt_logprobs=5)
    own = theirs = 0.0
    for output in outputs:
        (answer,) = output.outputs
        ids = torch.tensor([[*output.prompt_token_ids, *answer.token_ids]])
        whole = model(ids)[0].float().log_softmax(-1)
        cached = model(ids, cache=model.new_cache(1, 1280))[0].float().log_softmax(-1)
        own = max(own, float((whole - cached).abs().max()))
        for i, found in enumerate([*output.prompt_logprobs, *answer.logprobs]):
            for token, one in (found or {}).items():
                theirs = max(theirs, abs(one.logprob - float(whole[i - 1, token])))
    assert theirs < max(3 * own, 0.1)
