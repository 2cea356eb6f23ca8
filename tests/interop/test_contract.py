"""What callers of `transformers` pass to an export's models: honoured, or refused in words."""

import copy
import re
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache
from variants import KINDS, OVERLAYS, SMALL, make_model, perturb, token_ids

import bov_lightning
import bov_lightning.hf
from bov_lightning.errors import UserError
from bov_lightning.interop.hf_cache import BoVCache
from bov_lightning.interop.hf_model import BoVConfig, BoVForCausalLM, BoVModel
from bov_lightning.interop.hf_vocabulary import vocabulary_dimensions
from bov_lightning.model.layers import rms_norm

pytestmark = pytest.mark.slow

VARIANTS = sorted({*KINDS, "low_rank_bank"})
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 70}
"""`transformers` takes tokens of the padding's id for padding: here no token has it."""


def make(name: str = "bov", kind=BoVForCausalLM, **shape):
    """A model of `transformers`, in eval mode, with weights that let no path hide."""
    network = perturb(make_model(OVERLAYS[name], **shape), smear=0.9)
    model = kind(BoVConfig(**asdict(network.config)))
    model.model.load_state_dict(network.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def model() -> BoVForCausalLM:
    return make()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        off = (found[name] - gradient).norm()
        assert off <= 1e-4 * gradient.norm() + 1e-6 * largest, name


# Losses


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (1, 2, 3), (1,) * 6])
def test_micro_batches_add_up_to_the_gradient_of_all_rows(model, sizes):
    """With other numbers of counted labels in each."""
    ids = token_ids(20, 6)
    labels = ids.clone()
    for row in range(6):
        labels[row, : 3 * row] = -100
    model(ids, labels=labels, use_cache=False).loss.backward()
    expected = gradients(model)
    n_item = (labels[:, 1:] != -100).sum()
    losses = []
    for rows, targets in zip(ids.split(sizes), labels.split(sizes), strict=True):
        loss = model(rows, labels=targets, num_items_in_batch=n_item, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    assert_equal(gradients(model), expected)
    assert sum(losses) == pytest.approx(model(ids, labels=labels).loss.item(), abs=1e-5)


@torch.no_grad()
def test_labels_go_with_the_logits_that_are_kept(model):
    ids = token_ids(30)
    whole = model(ids).logits
    expected = F.cross_entropy(whole[:, 19:-1].flatten(0, 1), ids[:, 20:].flatten())
    last = model(ids, labels=ids, logits_to_keep=11)
    assert torch.allclose(last.loss, expected, atol=1e-5)
    assert torch.allclose(last.logits, whole[:, 19:], atol=1e-5)
    some = model(ids, logits_to_keep=torch.tensor([3, 0, 29]))
    assert torch.allclose(some.logits, whole[:, [3, 0, 29]], atol=1e-5)
    shifted = F.pad(ids, (0, 1), value=-100)[:, 1:]
    assert torch.equal(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)


def test_blocks_that_are_computed_again_give_the_same_gradients():
    for kwargs in ({"use_reentrant": False}, {"use_reentrant": True}):
        model, ids = make().train(), token_ids(40)
        model(ids, labels=ids).loss.backward()
        expected = gradients(model)
        model.activation_checkpointing_enable(kwargs)
        assert model.is_gradient_checkpointing
        model(ids, labels=ids).loss.backward()
        assert_equal(gradients(model), expected)
        model.activation_checkpointing_disable()
        assert not model.is_gradient_checkpointing


# Arguments


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_packed_texts_do_not_see_each_other(name):
    model, ids = make(name, sequence_len=64), token_ids(300)
    lengths = (140, 1, 159)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=positions).logits
    alone = [model(part).logits for part in ids.split(lengths, dim=1)]
    assert torch.allclose(packed, torch.cat(alone, 1), atol=1e-5)
    with pytest.raises(UserError, match="cannot continue"):
        model(ids, position_ids=positions, use_cache=True)


@torch.no_grad()
def test_positions_that_say_what_holds_anyway_change_nothing(model):
    """Only distances count: a text may start anywhere, and padding stands nowhere."""
    ids = token_ids(30)
    expected = model(ids).logits
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    for positions in (torch.arange(30)[None], torch.arange(7, 37).expand(2, -1)):
        assert torch.equal(model(ids, position_ids=positions).logits, expected)
        both = model(ids, attention_mask=mask, position_ids=positions).logits
        assert torch.equal(both, model(ids, attention_mask=mask, position_ids=counted).logits)
    cache = BoVCache()
    model(ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
    with pytest.raises(UserError, match="goes on at 3"):
        model(ids[:, 12:], past_key_values=cache, position_ids=torch.arange(12, 30)[None])
    rest = model(ids[:, 12:], past_key_values=cache, position_ids=counted[:, 12:]).logits
    assert torch.allclose(rest[1], expected[1, 12:], atol=1e-5)


@torch.no_grad()
def test_embeddings_stand_for_ids(model):
    ids = token_ids(25)
    for name in ("standard", "first_layer_every", "initial_embedding"):
        other = make(name)
        embedded = other.get_input_embeddings()(ids)
        assert torch.equal(other(inputs_embeds=embedded).logits, other(ids).logits)
        tokens = other.generate(inputs_embeds=embedded, max_new_tokens=5, **GREEDY)
        assert torch.equal(tokens, other.generate(ids, max_new_tokens=5, **GREEDY)[:, 25:])
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(ids, inputs_embeds=embedded).logits, model(ids).logits)
    with pytest.raises(UserError, match="values come from bank, which is looked up by token id"):
        model(inputs_embeds=embedded)


@torch.no_grad()
def test_hidden_states_are_those_that_the_head_reads(model):
    ids = token_ids(30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[1, 20:] = 0
    base = make(kind=BoVModel)
    for use_cache in (False, True):
        output = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=use_cache)
        assert len(output.hidden_states) == SMALL["n_layer"] + 1
        assert {tuple(state.shape) for state in output.hidden_states} == {(2, 30, 48)}
        logits = model.model.head(output.hidden_states[-1], None, "mean")
        assert torch.allclose(logits, output.logits, atol=1e-5)
        theirs = base(ids, attention_mask=mask, output_hidden_states=True, use_cache=use_cache)
        assert torch.equal(theirs.last_hidden_state, output.hidden_states[-1])
    first = rms_norm(model.model.embedding(ids[1:]))
    smeared = model.model.smear(first, None)
    assert torch.allclose(output.hidden_states[0][1, :20], smeared[0, :20], atol=1e-6)
    assert model(ids).hidden_states is None


@torch.no_grad()
def test_the_configuration_speaks_where_an_argument_is_silent(model):
    ids = token_ids(9)
    assert isinstance(model(ids).past_key_values, BoVCache)
    assert model(ids, use_cache=False).past_key_values is None
    logits, cache = model(ids, return_dict=False)
    assert torch.equal(logits, model(ids).logits)
    assert isinstance(cache, BoVCache)
    other = copy.deepcopy(model)
    other.config.use_cache, other.config.output_hidden_states = False, True
    output = other(ids)
    assert output.past_key_values is None
    assert len(output.hidden_states) == 7
    other.train()
    assert other(ids, use_cache=True).past_key_values is not None
    other.config.use_cache = True
    assert other(ids).past_key_values is None


IDS = token_ids(12)
ONES = torch.ones(2, 12, dtype=torch.int64)
HOLE = ONES.clone()
HOLE[1, 5] = 0
REFUSED = [
    ({}, "neither input_ids nor inputs_embeds"),
    ({"input_ids": IDS[0]}, r"input_ids is (12,)"),
    ({"input_ids": IDS[:, :0]}, "no tokens"),
    ({"input_ids": IDS + 60}, "outside of the vocabulary of 70"),
    ({"input_ids": IDS, "output_attentions": True}, "output_attentions"),
    ({"input_ids": IDS, "attention_mask": HOLE}, "in the middle of row 1"),
    ({"input_ids": IDS, "attention_mask": ONES[:, :11]}, "attention_mask is (2, 11)"),
    ({"input_ids": IDS, "attention_mask": ONES[:1]}, "attention_mask is (1, 12)"),
    ({"input_ids": IDS, "attention_mask": ONES * 2}, "other numbers than 0 (padding) and 1"),
    ({"input_ids": IDS, "attention_mask": torch.zeros(2, 12).fill_(-9)}, "other numbers"),
    ({"input_ids": IDS, "attention_mask": ONES[:, None, None]}, "must be (batch, time)"),
    ({"input_ids": IDS, "position_ids": 2 * torch.arange(12)[None]}, "from 0 to 2 in row 0"),
    ({"input_ids": IDS, "position_ids": torch.arange(11)[None]}, "(2, 12) fits"),
    ({"input_ids": IDS, "position_ids": torch.arange(12).expand(3, -1)}, "of 3 rows"),
    ({"input_ids": IDS, "past_key_values": DynamicCache()}, "a DynamicCache, which has no place"),
    ({"input_ids": IDS, "past_key_values": ((IDS,),)}, "a tuple, which has no place"),
    ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 12, 47)}, "(batch, time, 48)"),
    ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 11, 48)}, "of the same tokens"),
    ({"input_ids": IDS, "head_mask": torch.ones(6, 4)}, "head_mask is nothing"),
    ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 12])}, "cu_seq_lens_q is nothing"),
    ({"input_ids": IDS, "token_type_ids": ONES}, "token_type_ids is nothing"),
    ({"input_ids": IDS, "is_causal": False}, "is_causal is nothing"),
    ({"input_ids": IDS, "cache_position": torch.arange(3, 15)}, "cache_position is nothing"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_what_cannot_be_honoured_is_refused(model, arguments, words):
    with pytest.raises(UserError, match=re.escape(words)):
        model(**arguments)


@torch.no_grad()
def test_arguments_that_ask_for_nothing_pass(model):
    expected = model(IDS).logits
    for nothing in (
        {"token_type_ids": ONES * 0}, {"cache_position": torch.arange(12)}, {"head_mask": None},
        {"output_router_logits": False}, {"attention_mask": ONES.bool()},
        {"attention_mask": ONES.float()},
        {"tokenizer": object()}, {"is_causal": True}, {"seq_idx": ONES},
        {"cu_seq_lens_q": torch.tensor([0, 12, 24]), "max_length_q": 12},
    ):  # fmt: skip
        assert torch.equal(model(IDS, **nothing).logits, expected)


# Caches


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(VARIANTS),
    edges=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 89), max_size=4),
    room=st.sampled_from([None, 1, 90]),
)
@torch.no_grad()
def test_padding_and_pieces_do_not_matter(name, edges, cuts, room):
    """Rows padded on both sides, fed in pieces whose edges cut the padding too."""
    model, ids = make(name, sequence_len=64), token_ids(90, len(edges))
    mask = torch.ones_like(ids)
    for row, (left, right) in enumerate(edges):
        mask[row, :left] = 0
        mask[row, 90 - right :] = 0
    cache, found = BoVCache(room), []
    bounds = [0, *sorted(cuts), 90]
    for first, end in pairwise(bounds):
        output = model(ids[:, first:end], attention_mask=mask[:, :end], past_key_values=cache)
        found.append(output.logits)
    found = torch.cat(found, 1)
    for row, (left, right) in enumerate(edges):
        text = slice(left, 90 - right)
        alone = model(ids[row : row + 1, text], use_cache=False).logits[0]
        assert torch.allclose(found[row, text], alone, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_second_turn_equals_a_fresh_start(name):
    model, ids = make(name, sequence_len=64), token_ids(40)
    options = {"max_new_tokens": 9, **GREEDY}
    first = model.generate(ids, return_dict_in_generate=True, **options)
    second = torch.cat((first.sequences, token_ids(300)[:, :80]), 1)
    kept = copy.deepcopy(first.past_key_values)
    expected = model.generate(second, **options)
    for cache in (first.past_key_values, kept):
        assert torch.equal(model.generate(second, past_key_values=cache, **options), expected)


def test_a_copy_of_a_cache_shares_the_weights(model):
    ids = token_ids(12)
    with torch.no_grad():
        cache = model(ids).past_key_values
        copied = copy.deepcopy(cache)
        assert copied.past._blocks is model.model.blocks
        expected = model(ids, past_key_values=copied).logits
        model(token_ids(30), past_key_values=cache)
        again = copy.deepcopy(copied)
        assert torch.allclose(model(ids, past_key_values=again).logits[:, -1:],
                              model(ids, past_key_values=copied).logits[:, -1:])  # fmt: skip
    assert copied.get_seq_length() == 36
    assert expected.shape == (2, 12, 70)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_what_starts_a_cache(name):
    """The default of `use_cache` must not cost a gradient; what continues one carries none."""
    model, ids = make(name, sequence_len=64), token_ids(150)
    for n_token in (150, 1):
        expected = model(ids[:, :n_token], use_cache=False).logits
        expected.square().sum().backward()
        expected = gradients(model)
        output = model(ids[:, :n_token])
        output.logits.square().sum().backward()
        assert_equal(gradients(model), expected)
    assert not model(ids, past_key_values=output.past_key_values).logits.requires_grad


@torch.no_grad()
def test_a_cache_refuses_what_it_cannot_do(model):
    static = StaticCache(config=model.config, max_cache_len=50)
    with pytest.raises(UserError, match="a StaticCache, which has no place"):
        model.generate(IDS, past_key_values=static, max_new_tokens=2)
    for kind in ("static", "quantized", "offloaded"):
        with pytest.raises(UserError, match=f"cache_implementation '{kind}'"):
            model.generate(IDS, cache_implementation=kind, max_new_tokens=2, **GREEDY)
    cache = model(IDS).past_key_values
    with pytest.raises(UserError, match="cannot be hidden afterwards"):
        model(IDS, past_key_values=cache, attention_mask=torch.cat((HOLE, ONES), 1))
    with pytest.raises(UserError, match="the cache holds 2 rows, the batch 1"):
        model(IDS[:1], past_key_values=cache)
    with pytest.raises(UserError, match="another shape"):
        make(n_layer=3)(IDS, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="filled by the model"):
        cache.update(IDS, IDS, 0)


# Generation


def test_ways_of_generating(model):
    ids = token_ids(20)
    options = {"max_new_tokens": 6, **GREEDY}
    plain = model.generate(ids, **options)
    for same in ({"use_cache": False}, {"prefill_chunk_size": 7}, {"num_beams": 1}):
        assert torch.equal(model.generate(ids, **options, **same), plain)
    beams = {"num_beams": 4, "num_return_sequences": 2}
    cached = model.generate(ids, **options, **beams)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options, **beams))
    assert cached.shape == (4, 26)
    torch.manual_seed(1)
    sampled = model.generate(ids, max_new_tokens=6, do_sample=True, num_return_sequences=3,
                             eos_token_id=None, pad_token_id=70)  # fmt: skip
    assert sampled.shape == (6, 26)
    told = model.generate(
        ids, return_dict_in_generate=True, output_hidden_states=True, output_logits=True, **options
    )
    assert len(told.hidden_states) == len(told.logits) == 6
    assert told.hidden_states[0][-1].shape == (2, 20, 48)
    assert told.hidden_states[1][-1].shape == (2, 1, 48)


def test_generation_that_takes_tokens_back_is_refused(model):
    assistant = make("standard")
    for how in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="assisted generation is not supported"):
            model.generate(token_ids(9, 1), max_new_tokens=4, **GREEDY, **how)
    with pytest.raises(UserError, match="output_attentions"):
        model.generate(IDS, return_dict_in_generate=True, output_attentions=True, **GREEDY)


# Vocabularies


@pytest.mark.parametrize("name", ["bov", "value_embedding_gated", "low_rank_bank"])
@pytest.mark.parametrize("size", [70, 100, 128, 300, 40])
@torch.no_grad()
def test_a_vocabulary_of_another_size(name, size, tmp_path):
    """Old ids keep their logits, new ones can be used, and what is saved can be loaded."""
    model = make(name)
    ids = token_ids(30, vocab_size=min(size, 70))
    expected = model(ids).logits[..., :size]
    embedding = model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.model.config.vocab_size == size
    assert embedding is model.get_input_embeddings()
    found = model(ids).logits
    assert found.shape == (2, 30, size)
    assert torch.allclose(found[..., :70], expected, atol=1e-6)
    ids[0, 5] = size - 1
    found = model(ids, labels=ids).logits
    assert found.isfinite().all()
    model.save_pretrained(tmp_path)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
        bov_lightning.load(tmp_path)[0],
    ):
        logits = loaded(ids)
        assert torch.allclose(getattr(logits, "logits", logits), found, atol=1e-5)
    for parameter, dimension in vocabulary_dimensions(model.model.config).items():
        rows = model.model.get_parameter(parameter).shape[dimension]
        assert rows == model.model.config.padded_vocab_size


def test_how_new_ids_start_and_what_is_trained_stays(model):
    model = copy.deepcopy(model)
    model.model.embedding.requires_grad_(False)
    old = model.model.embedding.weight[:70]
    assert model.resize_token_embeddings() is model.model.embedding
    model.resize_token_embeddings(129, mean_resizing=True)
    weight = model.model.embedding.weight
    assert not weight.requires_grad
    assert model.model.head.weight.requires_grad
    assert torch.allclose(weight[70:], old.mean(0).expand(192 - 70, -1), atol=1e-6)
    model.resize_token_embeddings(130, pad_to_multiple_of=64, mean_resizing=False)
    assert model.config.vocab_size == 192
    assert model.model.embedding.weight[150].std() > 0.3
    with pytest.raises(UserError, match="from 2"):
        model.resize_token_embeddings(1)
    with pytest.raises(UserError, match="resize_token_embeddings"):
        model.set_input_embeddings(torch.nn.Embedding(330, 48))


# Entries


def test_the_base_model_reads_and_writes_the_same_files(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole").eval()
    assert type(base) is BoVModel
    assert not base.model.head.weight.requires_grad
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert (tmp_path / "base" / "modeling_bov.py").is_file()
