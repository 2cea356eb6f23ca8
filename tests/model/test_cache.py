"""Cached decoding equals the full forward, whatever is kept and however the text is cut."""

import pytest
import torch
from parity import NAMES, ParityRow
from variants import KINDS, OVERLAYS, WAYS, make_model, mostly_slow, perturb, token_ids

from bov_lightning.errors import UserError

SHAPES = {
    "full": {"window_pattern": "L"},
    "windows": {"window_pattern": "SSSL"},
    "windows alternate": {"window_pattern": "LS"},
    "grouped": {"window_pattern": "SL", "n_kv_head": 1},
    "one group": {"window_pattern": "SSSL", "n_kv_head": 4},
}
"""SMALL has 4 heads in 2 groups; a window of sequence_len 512 is 128."""

CHUNKS = (150, 1, 1, 40, 1, 70, 129, 1, 8)


def model_of(name: str, **shape):
    return perturb(make_model(OVERLAYS[name], **shape), smear=0.9)


def decode(model, ids, chunks, **options) -> torch.Tensor:
    """The logits of ``ids``, computed piece by piece."""
    cache = model.new_cache(len(ids), sum(chunks), **options)
    pieces = [model(piece, cache=cache) for piece in ids[:, : sum(chunks)].split(chunks, dim=1)]
    assert cache.lengths.tolist() == [sum(chunks)] * len(ids)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("shape", mostly_slow(SHAPES, {"windows", "grouped"}))
@pytest.mark.parametrize("name", mostly_slow(WAYS, KINDS))
@torch.no_grad()
def test_pieces_equal_the_whole(name, shape):
    model = model_of(name, **SHAPES[shape])
    ids = token_ids(sum(CHUNKS))
    assert (decode(model, ids, CHUNKS) - model(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("name", mostly_slow(NAMES, KINDS))
@torch.no_grad()
def test_pieces_compute_the_logits_of_the_authors_code(name, shared, tmp_path):
    row = ParityRow(shared, name)
    model, (ids, _) = row.imported_model(tmp_path), row.inputs_and_targets(0)
    chunks = [90, 1, 1, ids.shape[1] - 92]
    assert (decode(model, ids, chunks) - row.tensors["logits"]).abs().max() < 1e-4


# One shape for each: all products are cut into pieces above.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, [*SHAPES][i % 5]) for i, name in enumerate(WAYS)],
)
@torch.no_grad()
def test_greedy_decoding_token_by_token_equals_the_full_forward(name, shape):
    """Into windows of 128 tokens, and beyond them."""
    model = model_of(name, **SHAPES[shape])
    ids = token_ids(110)
    cache = model.new_cache(2, 170)
    logits = [model(ids, cache=cache)]
    for _ in range(60):
        token = logits[-1][:, -1:].argmax(-1)
        ids = torch.cat((ids, token), dim=1)
        logits.append(model(token, cache=cache))
    expected = model(ids)
    assert (torch.cat(logits, dim=1) - expected).abs().max() < 1e-4
    assert torch.equal(ids[:, 110:], expected[:, 109:-1].argmax(-1))


@pytest.mark.parametrize("name", mostly_slow(WAYS, KINDS))
@torch.no_grad()
def test_rows_of_different_lengths_equal_each_alone(name):
    """Ragged pieces, empty ones among them, one row beyond its window long before another."""
    ids = token_ids(300, n_row=3)
    lengths = [(5, 140, 60), (1, 1, 1), (0, 30, 1), (130, 7, 0), (1, 0, 1), (1, 1, 1), (3, 90, 140)]
    for shape in ({"window_pattern": "SSSL"}, {"window_pattern": "L", "n_kv_head": 1}):
        model = model_of(name, **shape)
        expected = model(ids)
        cache = model.new_cache(3, 300)
        for piece in lengths:
            padded = torch.zeros(3, max(piece), dtype=torch.int64)
            starts = cache.lengths.tolist()
            for row, (start, n) in enumerate(zip(starts, piece, strict=True)):
                padded[row, :n] = ids[row, start : start + n]
            logits = model(padded, cache=cache, lengths=torch.tensor(piece))
            for row, (start, n) in enumerate(zip(starts, piece, strict=True)):
                found, whole = logits[row, :n], expected[row, start : start + n]
                assert torch.allclose(found, whole, atol=1e-4), (shape, piece, row)
        assert cache.lengths.tolist() == [141, 269, 204]


@pytest.mark.parametrize("name", ["standard", "bov", "first_layer", "bov_add_context"])
@torch.no_grad()
def test_masked_documents_stay_masked(name):
    model = model_of(name, document_start=0)
    ids = 1 + token_ids(sum(CHUNKS), vocab_size=69)
    ids[0, [0, 3, 151, 200, 390]] = 0
    ids[1, [0, 150, 152, 192]] = 0
    assert (decode(model, ids, CHUNKS) - model(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["standard", "bov", "first_layer_every", "bov_add_context"])
@torch.no_grad()
def test_a_selected_cache_is_independent(name):
    """One prefix, many continuations."""
    model = model_of(name)
    ids = token_ids(200, n_row=2)
    cache = model.new_cache(2, 200)
    model(ids[:, :150], cache=cache, lengths=torch.tensor([150, 140]))
    branch = cache.select([1, 0, 1])
    assert branch.lengths.tolist() == [140, 150, 140]
    continuations = token_ids(40, n_row=3)
    found = model(continuations, cache=branch)
    assert cache.lengths.tolist() == [150, 140]
    for row, (source, n) in enumerate([(1, 140), (0, 150), (1, 140)]):
        text = torch.cat((ids[source, :n], continuations[row]))[None]
        assert torch.allclose(found[row], model(text)[0, n:], atol=1e-4)
    again = model(continuations[:2], cache=cache.select(torch.tensor([1, 0])))
    assert torch.allclose(again, found[:2], atol=1e-5)


@torch.no_grad()
def test_logits_of_chosen_positions():
    model, ids = model_of("bov"), token_ids(50)
    positions = torch.tensor([[0, 49, 7], [3, 3, 48]])
    expected = model(ids).gather(1, positions[:, :, None].expand(-1, -1, 70))
    torch.testing.assert_close(model(ids, positions_BP=positions), expected, atol=1e-5, rtol=0)
    cached = model(ids, cache=model.new_cache(2, 50), positions_BP=positions)
    assert torch.allclose(cached, expected, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_bfloat16_is_as_close_to_fp32_as_without_a_cache():
    for name in ("standard", "bov", "first_layer", "initial_embedding", "value_embedding_gated"):
        model, ids = model_of(name), token_ids(sum(CHUNKS))
        expected = model(ids)
        model.bfloat16()
        whole, pieces = model(ids), decode(model, ids, CHUNKS)
        assert (pieces - expected).norm() < 1.5 * (whole - expected).norm() + 1e-3


def vectors(cache) -> int:
    """Key and value vectors per row, counted from the bytes of all layers."""
    per_vector = cache.config.d_value * cache.batch_size * cache.previous_B1C.element_size()
    assert sum(cache.nbytes_per_layer) % per_vector == 0
    return sum(cache.nbytes_per_layer) // per_vector


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        # 6 layers of SMALL: windows of 128 tokens keep 129, the last layer all 1000.
        ("standard", "L", 12 * 1000),
        ("standard", "SSSL", 2 * (4 * 129 + 2 * 1000)),
        ("bov", "L", 6 * 1000 + 4 * 1000),
        ("bov", "SSSL", 2 * (3 * 129 + 1000) + 129 + 1000),
        ("bov_every_layer", "L", 6 * 1000),
        ("bov_add_context", "L", 12 * 1000),
        ("value_embedding_gated", "L", 12 * 1000),
        # The first layer's values serve all: its own store within its window, one more beyond.
        ("first_layer_every", "L", 6 * 1000 + 1000),
        ("first_layer_every", "SSSL", 4 * 129 + 2 * 1000 + 129 + 1000),
        ("first_layer", "SSSL", 2 * (3 * 129 + 1000) + 129 + 1000 + 1000),
        ("initial_embedding", "L", 12 * 1000),
    ],
)
def test_a_cache_keeps_what_its_values_need_and_no_more(name, pattern, expected):
    model = model_of(name, window_pattern=pattern)
    cache = model.new_cache(2, 1000)
    assert vectors(cache) == expected
    ids = 2 * 1000 * 8 if name in ("bov", "bov_every_layer") else 0
    smear, lengths = 2 * 48 * 4, 2 * 8
    assert cache.nbytes == sum(cache.nbytes_per_layer) + ids + smear + lengths
    half = model.new_cache(2, 1000, dtype=torch.bfloat16)
    assert 2 * sum(half.nbytes_per_layer) == sum(cache.nbytes_per_layer)


@torch.no_grad()
def test_wrong_use_is_refused():
    model = model_of("bov")
    cache = model.new_cache(2, 30)
    for ids, lengths, words in (
        (token_ids(5, n_row=3), None, "holds 2 rows, the batch 3"),
        (token_ids(0), None, "at least one"),
        (token_ids(31), None, "31 tokens do not fit into a context of 30"),
        (torch.full((2, 3), 70), None, "token id 70"),
        (torch.full((2, 3), -1), None, "token id -1"),
        (token_ids(5), torch.tensor([6, 1]), "do not fit"),
        (token_ids(5), torch.tensor([5]), "do not fit"),
    ):
        with pytest.raises(UserError, match=words):
            model(ids, cache=cache, lengths=lengths)
    with pytest.raises(UserError, match="rows"):
        cache.select([2])
    with pytest.raises(UserError, match="at least 1"):
        model.new_cache(0, 3)
    model(token_ids(30), cache=cache)
    with pytest.raises(UserError, match="31 tokens"):
        model(token_ids(1), cache=cache)
    assert cache.lengths.tolist() == [30, 30]
