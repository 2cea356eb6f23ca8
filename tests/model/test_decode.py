"""Reading a long past through an embedding bag equals gathering its values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bov_lightning.model import decode
from bov_lightning.model.attention import attend
from bov_lightning.model.decode import (
    attend_bag,
    attend_bank,
    attend_gathered,
    attend_summed,
    attend_values,
    best_way,
)

WEIGHTS = (1.0, 0.25, -2.0)
"""Of the rows of a token where it has several."""


def inputs(n_row, n_past, n_head, n_kv_head, vocab_size, ragged, seed=0, n_lookup=None):
    """Queries, keys in a larger room, ids, table, mask."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n_row, n_head, 1, 8, generator=generator)
    room = torch.randn(n_row, n_kv_head, n_past + 5, 8, generator=generator)
    shape = (n_row, n_past) if n_lookup is None else (n_row, n_past, n_lookup)
    ids = torch.randint(0, vocab_size, shape, generator=generator)
    table = torch.randn(vocab_size, n_kv_head * 8, generator=generator)
    mask = None
    if ragged:
        mask = torch.rand(n_row, 1, 1, n_past, generator=generator) < 0.7
        mask[..., -1] = True
    return q, room[:, :, :n_past], ids, table, mask


@settings(max_examples=40, deadline=None)
@given(
    n_row=st.integers(1, 3),
    n_past=st.integers(1, 90),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    vocab_size=st.sampled_from([3, 50]),
    ragged=st.booleans(),
)
def test_all_ways_of_reading_a_bank_are_equal(n_row, n_past, heads, vocab_size, ragged):
    arguments = inputs(n_row, n_past, *heads, vocab_size, ragged)
    expected = attend_gathered(*arguments)
    for way in (attend_bag, attend_summed, attend_bank):
        assert torch.allclose(way(*arguments), expected, atol=1e-5), way


@settings(max_examples=25, deadline=None)
@given(
    n_row=st.integers(1, 3),
    n_past=st.integers(1, 40),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    n_lookup=st.integers(1, 3),
    ragged=st.booleans(),
)
def test_weighted_sums_of_rows_are_kept_values(n_row, n_past, heads, n_lookup, ragged):
    """The oracle sums the rows of every token, as a cache of values would keep them."""
    q, k, ids, table, mask = inputs(n_row, n_past, *heads, 50, ragged, n_lookup=n_lookup)
    weights = WEIGHTS[:n_lookup]
    values = sum(w * table[ids[..., i]] for i, w in enumerate(weights))
    v = values.unflatten(-1, (heads[1], -1)).transpose(1, 2).contiguous()
    expected = attend_values(q, k, v, mask)
    for way in (attend_gathered, attend_bag, attend_summed, attend_bank):
        assert torch.allclose(way(q, k, ids, table, mask, weights), expected, atol=1e-5), way


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_reading_kept_values_equals_attention(heads, ragged):
    q, k, _, _, mask = inputs(2, 70, *heads, 9, ragged)
    v = torch.randn(2, heads[1], 100, 8)[:, :, :70]
    expected = attend(q, k, v, mask)
    for values in (v, v.contiguous(), v.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.allclose(attend_values(q, k, values, mask), expected, atol=1e-5)


@pytest.mark.parametrize("n_past", [7, 1300])
def test_half_precision_scores_are_products_in_fp32(n_past):
    q, k, ids, table, mask = inputs(2, n_past, 4, 2, 50, ragged=True)
    half = [x.bfloat16() for x in (q, k, table)]
    exact = [x.float() for x in half]
    expected = attend_gathered(exact[0], exact[1], ids, exact[2], mask)
    for way in (attend_bag, attend_summed):
        found = way(half[0], half[1], ids, half[2], mask)
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 6e-3 * expected.norm()
    for n in (n_past, n_past - 1):
        p = decode.probabilities(half[0], half[1][:, :, :n], mask[:, 0, :, :n])
        assert torch.allclose(
            p, decode.probabilities(exact[0], exact[1][:, :, :n], mask[:, 0, :, :n]), atol=1e-6
        )


def test_long_pasts_are_summed_and_pieces_gathered():
    assert best_way(1, 50, 50) is attend_bag
    assert best_way(1, 51, 50) is attend_summed
    assert best_way(2, 51, 50) is attend_gathered


def test_keys_of_another_dtype_than_the_queries():
    """A half-precision cache under an fp32 model."""
    q, k, ids, table, mask = inputs(2, 40, 4, 2, 50, ragged=True)
    for way in (attend_gathered, attend_bag, attend_summed):
        exact = way(q, k.bfloat16().float(), ids, table, mask)
        assert torch.allclose(way(q, k.bfloat16(), ids, table, mask), exact, atol=1e-5)
    kept = torch.randn(2, 2, 40, 8)
    found = attend_values(q, k.bfloat16(), kept.bfloat16(), mask)
    exact = attend_values(q, k.bfloat16().float(), kept.bfloat16().float(), mask)
    assert (found - exact).norm() < 6e-3 * exact.norm()
