"""Tables: sums, regressions and shrinking against the plain way of computing them."""

import numpy as np
import pytest
import torch
from evaluation_material import make_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from bov_lightning.errors import UserError
from bov_lightning.value_probe.calibration import Candidate, Regression, Sums, collect
from bov_lightning.value_probe.places import find_places, values
from bov_lightning.value_probe.rows import Rows, make_text
from bov_lightning.value_probe.settings import ProbeSettings


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_streaming_sums_are_those_of_all_values(batch_size):
    model = make_llama(num_key_value_heads=2).requires_grad_(False)
    places = find_places(model)
    ids = torch.randint(0, 40, (5, 16), generator=torch.Generator().manual_seed(2))
    every = {}
    with torch.no_grad(), values(places, lambda p, v: every.__setitem__(p.layer, v)):
        model(ids, use_cache=False)
    sums = {place.layer: Sums.empty(40, place, torch.device("cpu")) for place in places}
    for _ in collect(model, places, Rows(ids, ids), batch_size, sums):
        pass
    for layer, found in every.items():
        for token in range(40):
            expected = found[ids == token].sum(0)
            torch.testing.assert_close(sums[layer].plain[token], expected, atol=1e-5, rtol=1e-4)
        squares = found.double().square().sum((0, 1, 3))
        torch.testing.assert_close(sums[layer].squares, squares, rtol=1e-5, atol=0)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1e-2, 1.0]))
def test_the_regression_is_that_of_the_normal_equations(seed, ridge):
    draw = torch.Generator().manual_seed(seed)
    embedding = torch.randn(30, 6, generator=draw)
    weight = torch.rand(30, generator=draw) * (torch.arange(30) < 25)
    targets = torch.randn(30, 4, generator=draw)
    regression = Regression(embedding, weight)
    found = regression.predict(regression.fit(targets), ridge, 30)
    x = embedding / embedding.square().mean(1, keepdim=True).sqrt()
    x = torch.cat((x, torch.ones(30, 1)), 1).double().numpy()
    w = weight.double().numpy()[:, None]
    gram = x.T @ (w * x)
    size = np.trace(gram) / 7
    solved = np.linalg.solve(gram + ridge * size * np.eye(7), x.T @ (w * targets.numpy()))
    np.testing.assert_allclose(found.numpy(), x @ solved, atol=2e-3)


def test_rare_ids_are_shrunk_and_unseen_ones_regressed():
    draw = torch.Generator().manual_seed(0)
    mean, towards = torch.randn(3, 1, 4, generator=draw), torch.randn(3, 1, 4, generator=draw)
    table = Candidate(mean, torch.tensor([[0.0], [4.0], [1e9]]), towards)(slice(None), 4.0)
    torch.testing.assert_close(table[0], towards[0])
    torch.testing.assert_close(table[1], (mean[1] + towards[1]) / 2)
    torch.testing.assert_close(table[2], mean[2])


def test_parts_share_no_text(tokenizer):
    """Each document goes to one part, and all keys lead back to their ids."""
    documents = [f"{chr(97 + i) * 40} {i}" for i in range(26)] * 2
    few = ProbeSettings(tokens=300, held_out=150, row_length=10, batch_size=1)
    text = make_text(documents, tokenizer, few, 1000, 300)
    parts = [getattr(text, name) for name in ("calibration", "choice", "measured")]
    assert [len(rows) for rows in parts] == [30, 3, 12]
    for rows in parts:
        assert torch.equal(text.vocabulary[rows.keys], rows.ids)
        assert (rows.ids[:, 0] == text.start).all()
    assert max(int(rows.keys.max()) for rows in parts[1:]) < text.n_evaluated
    letters = [{c for row in rows.ids for c in tokenizer.decode(row) if c.isalpha()}
               for rows in parts]  # fmt: skip
    assert len(letters[1] & letters[2]) < len(letters[1])


def test_a_single_document_is_cut_among_the_parts(tokenizer, texts):
    few = ProbeSettings(tokens=800, held_out=300, row_length=20, batch_size=2)
    text = make_text(texts[:1], tokenizer, few, 1000, 300)
    assert [len(text.calibration), len(text.choice), len(text.measured)] == [40, 3, 12]


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"tokens": 10**6}, "the text holds 5 tokens, too few for a batch of 4 rows"),
        ({"batch_size": 1}, "the text holds 5 tokens, too few for a batch of 1 rows"),
    ],
)
def test_a_text_shorter_than_a_batch_is_refused(tokenizer, asked, line):
    with pytest.raises(UserError, match=line):
        make_text(["abcd"], tokenizer, ProbeSettings(row_length=8, **asked), 1000, 300)


@pytest.mark.parametrize(
    ("given_layers", "found"),
    [("every", [0, 1, 2]), ("last_third", [2]), ("2,0", [0, 2]), (" 1 ", [1])],
)
def test_layers_are_named_or_numbered(given_layers, found):
    assert ProbeSettings(layers=given_layers).layers_of(3) == found


@pytest.mark.parametrize(
    ("layers", "line"),
    [
        ("3", "--layers holds 3, but the model has layers 0 to 2"),
        ("some", "--layers some: use one of every, "),
        ("1;2", "--layers 1;2: give whole numbers"),
    ],
)
def test_other_layers_are_refused(layers, line):
    with pytest.raises(UserError, match=line):
        ProbeSettings(layers=layers).layers_of(3)
