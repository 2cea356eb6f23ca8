"""Values by n-gram: what a source sees of the text, however it comes, and the bank of n-grams."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.test_cache import CHUNKS, decode
from runs import assert_same_end, die_after, final_state, fit
from variants import SMALL, make_model, mostly_slow, perturb, token_ids

import bov_lightning
from bov_lightning.checkpoint.writing import config_yaml, write_checkpoint
from bov_lightning.errors import UserError
from bov_lightning.inference.graph import StaticStep
from bov_lightning.interop.hf_export import export
from bov_lightning.interop.hf_vocabulary import resize_vocabulary
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.counting import meta_model
from bov_lightning.model.lookup import class_path
from bov_lightning.model.ngrams import NO_KEY, largest_prime, ngram_keys
from bov_lightning.model.transformer import Transformer
from bov_lightning.model.values import NgramBank, ValueSource
from data_modules.order import _mix

VALUE = {"source": "ngram_bank", "layers": "last_third", "coefficient": "learned"}
START = 0


class Seen(ValueSource):
    """Values of zeros; what reaches it, it writes down."""

    reach = 3

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def row_ids(self, ngrams, positions):
        return torch.cat((ngrams, positions.expand(ngrams.shape[:2])[..., None]), dim=-1)

    def forward(self, inputs, projection):
        assert torch.equal(inputs.ngrams, inputs.row_ids[..., :-1])
        assert torch.equal(inputs.ngrams[..., 0], inputs.token_ids)
        self.seen.append(inputs.row_ids)
        return torch.zeros_like(inputs.x)[..., : SMALL["d_model"] // 2]


def expected_of(text: list[int], documents: bool) -> list[list[int]]:
    """Ids and position of every token, counted out."""
    found, first = [], 0
    for i, token in enumerate(text):
        first = i if documents and token == START else first
        before = [text[j] if j >= first else -1 for j in (i - 1, i - 2, i - 3)]
        found.append([token, *before, i - first])
    return found


def seeing_model(documents: bool) -> tuple[Transformer, Seen]:
    start = START if documents else None
    value = {"source": class_path(Seen), "layers": [1]}
    model = make_model(value, n_layer=2, document_start=start, window_pattern="L")
    return model, model.lookup_source


MODELS = {}


@settings(max_examples=25, deadline=None)
@given(draw=st.randoms(use_true_random=False), documents=st.booleans(), n_row=st.integers(1, 3))
@torch.no_grad()
def test_ngrams_are_the_same_however_the_text_comes(draw, documents, n_row):
    """Whole, in pieces of all lengths, and in ragged ones with rows that get nothing."""
    if documents not in MODELS:
        MODELS[documents] = seeing_model(documents)
    model, source = MODELS[documents]
    texts = [draw.choices(range(5), k=draw.randint(1, 12)) for _ in range(n_row)]
    expected = [expected_of(text, documents) for text in texts]
    for text, rows in zip(texts, expected, strict=True):
        source.seen.clear()
        model(torch.tensor([text]))
        assert source.seen[0][0].tolist() == rows
    cache, fed, found = model.new_cache(n_row, 12), [0] * n_row, [[] for _ in texts]
    while fed != [len(text) for text in texts]:
        left = [len(text) - n for text, n in zip(texts, fed, strict=True)]
        new = [draw.randint(0, n) for n in left]
        if draw.random() < 0.5:
            new = [min(left)] * n_row
        piece = torch.zeros(n_row, max(1, *new), dtype=torch.int64)
        for row, (text, n, first) in enumerate(zip(texts, new, fed, strict=True)):
            piece[row, :n] = torch.tensor(text[first : first + n])
        source.seen.clear()
        uniform = set(new) == {piece.shape[1]}
        model(piece, cache=cache, lengths=None if uniform else torch.tensor(new))
        for row, n in enumerate(new):
            found[row] += source.seen[0][row, :n].tolist()
            fed[row] += n
        if draw.random() < 0.3:
            cache = cache.select(range(n_row))
    assert found == expected


@torch.no_grad()
def test_another_text_in_a_row_is_not_reached():
    """``starts_BT``, as packed rows of transformers have it."""
    model, source = seeing_model(documents=False)
    ids, starts = token_ids(6, n_row=1), torch.tensor([[False, False, True, False, False, True]])
    model.stream(ids, starts_BT=starts)
    a, b, c, d, e, f = ids[0].tolist()
    assert source.seen[0][0].tolist() == [
        [a, -1, -1, -1, 0], [b, a, -1, -1, 1], [c, -1, -1, -1, 0],
        [d, c, -1, -1, 1], [e, d, c, -1, 2], [f, -1, -1, -1, 0],
    ]  # fmt: skip


@pytest.mark.gpu
def test_keys_are_those_of_exact_arithmetic(device):
    """64-bit products that wrap: the same on every device as numpy's of unsigned numbers."""
    ids = torch.randint(-1, 2**31, (500, 4), generator=torch.Generator().manual_seed(0))
    unsigned = ids.numpy().astype(np.uint64)
    golden = 0x9E3779B97F4A7C15
    key, expected = _mix(unsigned[:, 0], golden), []
    for i in (1, 2, 3):
        key = _mix(key ^ unsigned[:, i], golden)
        expected.append(key)
    found = ngram_keys(ids.to(device)).cpu().numpy().astype(np.uint64)
    assert (found == np.stack(expected, axis=1)).all()


def test_rows_are_spread_evenly_and_the_number_is_prime():
    assert [largest_prime(n) for n in (2, 4, 65_536, 2**18)] == [2, 3, 65_521, 262_139]
    first, second = torch.meshgrid(torch.arange(1000), torch.arange(500), indexing="ij")
    rows = ngram_keys(torch.stack((first, second), -1).flatten(0, 1)).remainder(997).flatten()
    counts = rows.bincount(minlength=997).double()
    # A Poisson distribution of mean 501.5, whose variance is that too.
    assert 0.8 < counts.var() / counts.mean() < 1.2


SETTINGS = {
    "bigrams": {"source_args": {"n_row": 101}},
    "trigrams": {"source_args": {"n_row": 101, "reach": 2, "factor": 0.5}},
    "frequent": {"source_args": {"n_row": 101, "reach": 2, "frequent": 20}},
    "position": {"source_args": {"n_row": 101, "position_period": 7}},
    "added": {"source_args": {"n_row": 101, "reach": 2}, "add_context": True},
    "shared": {"source_args": {"n_row": 101, "reach": 2, "frequent": 5}, "shared": True},
    "gated": {"source_args": {"n_row": 101}, "add_context": True, "coefficient": "gate"},
    "channels": {"source_args": {"n_row": 101}, "coefficient": "learned_per_channel"},
}


@torch.no_grad()
def model_of(name: str, **shape):
    """With rows of n-grams that are not zero, and frequent ones that occur."""
    model = perturb(make_model(VALUE | SETTINGS[name], **shape), smear=0.9)
    model.learn(token_ids(400))
    for bank in (module for module in model.modules() if isinstance(module, NgramBank)):
        bank.table.normal_(generator=torch.Generator().manual_seed(5))
    return model


@pytest.mark.parametrize("name", mostly_slow(SETTINGS, {"trigrams", "frequent", "position"}))
@torch.no_grad()
def test_pieces_equal_the_whole(name):
    """In windows and beyond; as one document, and as several."""
    for shape in ({"window_pattern": "SSSL"}, {"window_pattern": "L", "document_start": START}):
        model, ids = model_of(name, **shape), token_ids(sum(CHUNKS), vocab_size=9)
        whole = model(ids)
        assert (decode(model, ids, CHUNKS) - whole).abs().max() < 1e-4
        ragged = model.new_cache(2, len(ids[0]))
        model(ids[:, :200], cache=ragged, lengths=torch.tensor([200, 131]))
        for _ in range(3):
            at = ragged.lengths
            found = model(ids.gather(1, at[:, None]), cache=ragged)[:, 0]
            assert (found - whole[torch.arange(2), at]).abs().max() < 1e-4
        step, at = StaticStep(model, ragged), ragged.lengths.clone()
        for _ in range(2):
            found = step(ids.gather(1, at[:, None]), [True, False])[0]
            assert (found - whole[0, at[0]]).abs().max() < 1e-4
            at[0] += 1


@torch.no_grad()
def test_values_depend_on_as_many_tokens_as_they_say_and_on_no_other():
    """Without a smear, and with a single layer, the stream itself brings nothing of the others."""
    for name, reach in (("bigrams", 1), ("trigrams", 2), ("frequent", 2), ("position", 0)):
        model = model_of(name, window_pattern="L", n_layer=1, vocab_size=500)
        source, ids = model.lookup_source, torch.arange(100)[None]
        rows = source.row_ids(*ngrams_and_positions(ids, source.reach))
        for distance in range(4):
            changed = ids.clone()
            changed[0, 50 - distance] = 400
            after = source.row_ids(*ngrams_and_positions(changed, source.reach))
            assert torch.equal(rows[0, 50], after[0, 50]) == (distance > reach), (name, distance)


def ngrams_and_positions(ids, reach):
    padded = torch.nn.functional.pad(ids, (reach, 0), value=-1)
    ngrams = torch.stack([padded[:, reach - i : padded.shape[1] - i] for i in range(reach + 1)], -1)
    return ngrams, torch.arange(ids.shape[1])[None]


@torch.no_grad()
def test_a_fresh_ngram_bank_is_the_bank():
    ids = token_ids(300)
    bank = perturb(make_model({**VALUE, "source": "bank"}), smear=0.9)
    ngrams = make_model(VALUE | SETTINGS["trigrams"])
    ngrams.load_state_dict(bank.state_dict() | {
        name: p for name, p in ngrams.state_dict().items() if name.endswith("table")
    })  # fmt: skip
    assert torch.equal(bank(ids), ngrams(ids))


def test_the_factor_is_a_learning_rate():
    """AdamW moves a row by its learning rate whatever its gradient is: what is read moves by that
    times the factor."""
    ids, moved = token_ids(65), {}
    for factor in (1.0, 0.25):
        value = VALUE | {"source_args": {"n_row": 101, "factor": factor}}
        model = perturb(make_model(value), smear=0.5)
        before = model.lookup_source.table.detach().clone()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-15, weight_decay=0)
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        bank = model.lookup_source
        rows = bank.row_weights[1] * (bank.table - before)[bank.n_vocab :]
        assert bank.row_weights[0] == 1
        moved[factor] = rows[rows.abs().sum(1) > 0]
    assert moved[1.0].shape == moved[0.25].shape
    assert torch.allclose(0.25 * moved[1.0].abs(), moved[0.25].abs(), rtol=1e-4)


@torch.no_grad()
def test_frequent_ngrams_have_rows_of_their_own():
    model = make_model(VALUE | {"source_args": {"n_row": 60, "reach": 2, "frequent": 3}})
    bank = model.lookup_source
    n_hashed = len(bank.table) - bank.n_vocab - 3
    assert n_hashed == 53
    assert bank.frequent.tolist() == [NO_KEY] * 3
    # (1, 2) three times, (2, 1) twice, and (3, 1, 2) twice: by order of the ids, nearest first.
    text = torch.tensor([[1, 2, 8, 1, 2, 1, 9, 2, 1, 2, 1, 7]])
    model.learn(text)
    blocks = [b.attention.value.source for b in model.blocks[-2:]]
    assert torch.equal(blocks[0].frequent, blocks[1].frequent)
    ngrams, positions = ngrams_and_positions(text, 2)
    keys = ngram_keys(ngrams).flatten()
    counted = {key: (keys == key).sum().item() for key in keys.tolist()}
    best = sorted(counted.values(), reverse=True)[:3]
    assert sorted((counted[k] for k in bank.frequent.tolist()), reverse=True) == best
    rows = bank.row_ids(ngrams, positions)
    own = (rows[..., 1:] >= bank.n_vocab) & (rows[..., 1:] < bank.n_vocab + 3)
    assert own.sum().item() == sum(best)
    for key, row in zip(keys.tolist(), rows[..., 1:].flatten().tolist(), strict=True):
        if key in bank.frequent.tolist():
            assert row == bank.n_vocab + bank.frequent.tolist().index(key)
        else:
            assert row == bank.n_vocab + 3 + key % n_hashed


class Kept(NgramBank):
    """With a cache of values."""

    value_cache = True


@torch.no_grad()
def test_a_cache_of_values_gives_the_same():
    kept = make_model(VALUE | {"source": class_path(Kept)} | SETTINGS["trigrams"])
    model, ids = model_of("trigrams"), token_ids(sum(CHUNKS))
    kept.load_state_dict(model.state_dict())
    assert torch.equal(kept(ids), model(ids))
    assert (decode(kept, ids, CHUNKS) - decode(model, ids, CHUNKS)).abs().max() < 1e-4
    caches = [m.new_cache(2, 1000) for m in (kept, model)]
    added = [sum(c.nbytes_per_layer) for c in caches]
    assert added[0] - added[1] == 4 * 2 * (129 + 1000) * kept.config.d_value
    numbers = 2 * 1000 * 3 * 8
    assert caches[1].nbytes - added[1] - (caches[0].nbytes - added[0]) == numbers


@torch.no_grad()
def test_one_prefix_has_many_continuations():
    model = model_of("frequent")
    prefix, more = token_ids(140, n_row=1), token_ids(4, n_row=3)
    cache = model.new_cache(1, 150)
    model(prefix, cache=cache)
    found = model(more, cache=cache.select([0, 0, 0]))
    expected = model(torch.cat((prefix.expand(3, -1), more), dim=1))[:, 140:]
    assert (found - expected).abs().max() < 1e-4


@torch.no_grad()
def test_a_text_that_is_only_counted_leaves_the_same_numbers():
    model, ids = model_of("frequent", document_start=START), token_ids(150, vocab_size=9)
    real, counted = model.new_cache(2, 160), model.new_cache(2, 160)
    model(ids, cache=real)
    counted.pretend(ids)
    more = token_ids(3, vocab_size=9)
    model(more, cache=real), model(more, cache=counted)
    assert torch.equal(real.lengths, counted.lengths)
    assert torch.equal(real.previous_ids_BR, counted.previous_ids_BR)
    assert torch.equal(real.layers[5].row_ids, counted.layers[5].row_ids)
    assert torch.equal(real.masks[None], counted.masks[None])


def write(folder, name: str, **shape):
    model = model_of(name, **shape)
    write_checkpoint(folder / "checkpoint", 1, model.state_dict(), config_yaml(model.config))
    return folder / "checkpoint"


@pytest.mark.gpu
@torch.no_grad()
def test_tables_elsewhere_give_the_same(tmp_path, device):
    checkpoint = write(tmp_path, "frequent")
    plain, _ = bov_lightning.load(checkpoint, device=device)
    ids = token_ids(300).to(device)
    expected = plain(ids)
    for where in ("cpu", "mmap"):
        model, _ = bov_lightning.load(checkpoint, device=device, bank_device=where)
        assert torch.equal(model(ids), expected)
        cache = model.new_cache(2, 300)
        pieces = [model(piece, cache=cache) for piece in ids.split((150, 1, 1, 148), dim=1)]
        assert (torch.cat(pieces, 1) - expected).abs().max() < 1e-4
        rows = model.lookup_source.row_ids(
            *(x.to(device) for x in ngrams_and_positions(ids.cpu(), 2))
        )
        assert cache.slots.n_used == len(rows.unique())


@pytest.mark.slow
@torch.no_grad()
def test_exports_carry_the_ngrams_that_have_rows_of_their_own(tmp_path):
    checkpoint = write(tmp_path, "frequent", n_layer=3)
    assert export(checkpoint, tmp_path / "export") < 1e-4
    ours, _ = bov_lightning.load(tmp_path / "export")
    theirs, _ = bov_lightning.load(checkpoint)
    assert (ours.lookup_source.frequent < NO_KEY).all()
    assert torch.equal(ours(token_ids(50)), theirs(token_ids(50)))


@torch.no_grad()
def test_another_vocabulary_keeps_the_rows_of_ngrams():
    for size in (140, 64):
        model, ids = model_of("trigrams"), token_ids(50, vocab_size=60)
        before, rows = model(ids), model.lookup_source.table[128:].clone()
        resize_vocabulary(model, size, as_mean=True)
        bank = model.lookup_source
        assert bank.n_vocab == model.config.padded_vocab_size == -(-size // 64) * 64
        assert torch.equal(bank.table[bank.n_vocab :], rows)
        n_common = min(size, 70)
        assert torch.allclose(model(ids)[..., :n_common], before[..., :n_common], atol=1e-5)


def test_a_model_without_memory_finds_its_rows():
    config = make_model(VALUE | SETTINGS["frequent"]).config
    logits = meta_model(config)(torch.zeros(2, 20, dtype=torch.int64, device="meta"))
    assert logits.shape == (2, 20, 70)


def most_frequent(directory: Path) -> list[int]:
    """The keys of the 100 most frequent bigrams and trigrams of all training rows, counted out."""
    rows = np.concatenate(
        [np.fromfile(p, np.uint16) for p in sorted(directory.rglob("train*.bin"))]
    )
    counts = Counter()
    for row in rows.reshape(-1, 33).tolist():
        text = [-1, -1, *row]
        counts.update((text[i], text[i - 1]) for i in range(2, 35))
        counts.update((text[i], text[i - 1], text[i - 2]) for i in range(2, 35))
    keys = {int(ngram_keys(torch.tensor(ngram))[-1]): n for ngram, n in counts.items()}
    return sorted(sorted(keys, key=lambda key: (-keys[key], key))[:100])


@pytest.mark.slow
def test_training_counts_the_ngrams_once(tiny_settings, tiny_recipe):
    """A run that was killed goes on with the rows of its own that it began with."""
    options = [
        "--model.config.value.source", "ngram_bank",
        "--model.config.value.source_args", "{n_row: 500, reach: 2, frequent: 100}",
    ]  # fmt: skip
    run = fit(tiny_recipe, *options)
    whole = Path(shutil.copytree(run, "whole"))
    (frequent,) = (t for name, t in final_state(whole)[0].items() if name.endswith("frequent"))
    assert frequent.tolist() == most_frequent(Path(tiny_settings["data"]["init_args"]["directory"]))
    die_after(run, 4)
    fit(tiny_recipe, *options)
    assert_same_end(whole, run)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"n_row": 100, "frequent": 99}, "n_row is 100, but 99 frequent n-grams"),
        ({"frequent": 10, "position_period": 16}, "set one of the two"),
        ({"n_rows": 100}, "did you mean value.source_args.n_row"),
        ({"n_row": "many"}, "n_row is 'many', but must be an integer"),
        ({"n_row": 1}, "n_row is 1: from 2 to"),
        ({"reach": 0}, "reach is 0: from 1 to 15"),
        ({"factor": 0}, "above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(args, words):
    with pytest.raises(UserError, match=words):
        TransformerConfig(**SMALL, value=ValueConfig(**VALUE, source_args=args))


def test_a_reach_beyond_the_row_is_refused():
    with pytest.raises(UserError, match="looks 8 tokens back, but rows have 8"):
        make_model(VALUE | {"source_args": {"reach": 8}}, sequence_len=8)
    make_model(VALUE | {"source_args": {"reach": 7}}, sequence_len=8)
