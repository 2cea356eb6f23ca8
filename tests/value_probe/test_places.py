"""Values are found in models of every make, or the model is refused by name."""

import pytest
import torch
from evaluation_material import make_llama, tiny
from variants import KINDS, OVERLAYS, make_model, mostly_slow, perturb, token_ids

from bov_lightning.errors import UserError
from bov_lightning.value_probe.calibration import Sums, collect
from bov_lightning.value_probe.places import attended, call, find_places, replayed, values
from bov_lightning.value_probe.rows import Rows

MAKES = {
    "llama": {}, "qwen2": {}, "mistral": {"sliding_window": 12}, "gemma2": {"sliding_window": 12},
    "gemma3_text": {"sliding_window": 12}, "olmo2": {}, "mixtral": {"num_local_experts": 4},
    "phi": {}, "opt": {}, "gptj": {}, "gpt2": {}, "gpt_neox": {}, "phi3": {}, "bloom": {},
    "mpt": {},
}  # fmt: skip
"""By ``model_type``: values that stand alone, that follow queries and keys, that lie per head."""
IDS = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", mostly_slow(MAKES, ("llama", "gpt2", "gpt_neox", "phi3")))
def test_they_are_what_the_model_caches(kind):
    """An oracle of its own: a cache of ``transformers`` holds the values by layer."""
    model = tiny(kind, MAKES[kind])
    places = find_places(model)
    found = {}
    with values(places, lambda place, v: found.__setitem__(place.layer, v)):
        logits = model(IDS, use_cache=True)
    for place, layer in zip(places, logits.past_key_values.layers, strict=True):
        kept = found[place.layer].transpose(1, 2)[:, :, -layer.values.shape[2] :]  # of a window
        torch.testing.assert_close(kept, layer.values)
    # Put back where they were, they change nothing; others do.
    with values(places, lambda place, v: found[place.layer].clone()):
        torch.testing.assert_close(model(IDS, use_cache=False).logits, logits.logits)
    with values(places, lambda place, v: v.flip(1)):
        assert not torch.allclose(model(IDS, use_cache=False).logits, logits.logits, atol=0.1)
    torch.testing.assert_close(model(IDS, use_cache=False).logits, logits.logits)


@torch.no_grad()
@pytest.mark.parametrize("name", mostly_slow(sorted(KINDS), ("bov",)))
def test_our_own_values_too(name):
    model = perturb(make_model(OVERLAYS[name]), 0.3)
    places = find_places(model)
    ids = token_ids(24)
    seen = {}
    with (
        attended(places, lambda place, y: seen.__setitem__(place.layer, y)),
        values(places, lambda place, v: torch.ones_like(v)),
    ):
        call(model, ids)
    for y in seen.values():
        torch.testing.assert_close(y, torch.ones_like(y))
    value = model.config.value
    keeps_none = value.source in ("bank", "ngram_bank", "first_layer", "layer", "key")
    expected = model.config.target_layers if keeps_none and not value.add_context else []
    assert [place.layer for place in places if not place.cached] == list(expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_that_are_replayed_compute_nothing(kind):
    model = tiny(kind, {})
    places = find_places(model)
    logits, kept, used = model(IDS, use_cache=False).logits, [], []
    handle = places[0].block.register_forward_hook(lambda m, i, out: kept.append(out))
    model(IDS, use_cache=False)
    handle.remove()
    with (
        replayed([(places[0], kept[0])]),
        values(places, lambda place, v: used.append(place.layer)),
    ):
        torch.testing.assert_close(model(IDS, use_cache=False).logits, logits)
    assert used == [1]
    model(IDS, use_cache=False)
    assert "forward" not in vars(places[0].block)


def test_attention_that_values_get_is_that_of_the_weights():
    """Against ``transformers``' own attention weights, heads in groups."""
    model = make_llama(num_key_value_heads=2).requires_grad_(False)
    places = find_places(model)
    keys = torch.arange(IDS.numel()).view_as(IDS)
    sums = {place.layer: Sums.empty(IDS.numel(), place, torch.device("cpu")) for place in places}
    assert list(collect(model, places, Rows(IDS, keys), 1, sums)) == [1, 2]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(IDS, output_attentions=True).attentions
    for place, weight_BHQT in zip(places, weights, strict=True):
        per_head = weight_BHQT.sum(2).unflatten(1, (2, -1)).sum(2)  # (B, K, T)
        found = sums[place.layer].attention.view(*IDS.shape, 2)
        torch.testing.assert_close(found, per_head.transpose(1, 2))
    assert not torch.is_grad_enabled() or all(p.grad is None for p in model.parameters())


def test_shared_projections_are_refused():
    model = make_llama()
    layers = model.model.layers
    layers[1].self_attn.v_proj = layers[0].self_attn.v_proj
    with pytest.raises(UserError, match="layers 0 and 1 of LlamaForCausalLM share one value"):
        find_places(model)


def test_values_of_another_layer_are_refused():
    """As models do that keep one cache for several layers."""
    model = make_llama()
    attention = model.model.layers[1].self_attn
    own, other = attention.v_proj, model.model.layers[0].self_attn.v_proj
    attention.forward = lambda *inputs, **named: _with(attention, other, own, inputs, named)
    with pytest.raises(UserError, match=r"layer 1 of LlamaForCausalLM does not use its value"):
        find_places(model)


def _with(attention, other, own, inputs, named):
    attention.v_proj = torch.nn.Linear(own.in_features, own.out_features, bias=False)
    try:
        return type(attention).forward(attention, *inputs, **named)
    finally:
        attention.v_proj = own


@pytest.mark.parametrize(
    ("kind", "more", "line"),
    [
        ("mamba", {"state_size": 4}, "MambaForCausalLM has no value projections"),
        ("falcon", {}, "FalconForCausalLM cannot be probed"),
    ],
)
def test_what_has_none_is_refused(kind, more, line):
    with pytest.raises(UserError, match=line) as caught:
        find_places(tiny(kind, more))
    assert "\n" not in str(caught.value)
