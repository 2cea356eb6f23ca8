"""Attention that tells its shares, against PyTorch's and against the derivative."""

import pytest
import torch
import torch.nn.functional as F
from evaluation_material import make_llama, tiny

from bov_lightning.value_probe.attention import N_QUERY, Attending
from bov_lightning.value_probe.calibration import Sums, _by_derivative, _tells_shares, collect
from bov_lightning.value_probe.places import find_places
from bov_lightning.value_probe.rows import Rows

IDS = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
@pytest.mark.parametrize(("n_token", "scale"), [(5, None), (2 * N_QUERY + 7, 0.3)])
def test_it_is_pytorchs_and_its_shares_are_those_of_the_weights(mask, n_token, scale):
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n_head, n_token, 8, generator=draw) for n_head in (6, 3, 3))
    how = {"scale": scale, "enable_gqa": True, "is_causal": mask == "causal"}
    causal = torch.ones(n_token, n_token, dtype=torch.bool).tril()
    allowed = causal & torch.ones_like(causal).triu(-3)  # a window
    if mask == "bool":
        how["attn_mask"] = allowed
    elif mask == "added":
        bias = torch.randn(2, 1, n_token, n_token, generator=draw)
        how["attn_mask"] = bias.masked_fill(~allowed, -torch.inf)
    expected = F.scaled_dot_product_attention(query, key, value, **how)
    seen = []
    with Attending(seen.append):
        found = F.scaled_dot_product_attention(query, key, value, **how)
    torch.testing.assert_close(found, expected)
    # What is attended to, with each key's own unit vector as its value, is its weight.
    units = torch.eye(n_token).expand(2, 3, -1, -1)
    weights_BHTS = F.scaled_dot_product_attention(query, key, units, **how)
    torch.testing.assert_close(seen, [weights_BHTS.sum(2).transpose(1, 2)])


def test_both_ways_give_the_same_sums():
    """Of some layers among others, which attend as well."""
    model = make_llama(num_hidden_layers=4, num_key_value_heads=2).requires_grad_(False)
    places = find_places(model)[1::2]
    assert _tells_shares(model, places, IDS)
    keys = torch.arange(IDS.numel()).view_as(IDS)
    sums, others = (
        {place.layer: Sums.empty(IDS.numel(), place, torch.device("cpu")) for place in places}
        for _ in range(2)
    )
    assert list(collect(model, places, Rows(IDS, keys), 1, sums)) == [1, 2]
    _by_derivative(model, places, IDS, lambda p, v, a: others[p.layer].add(keys, v, a))
    for layer, found in sums.items():
        for name, tensor in vars(found).items():
            other = getattr(others[layer], name)
            torch.testing.assert_close(tensor, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("how", "tells"), [("sdpa", True), ("eager", False)])
def test_models_that_attend_in_their_own_way_are_told_apart(how, tells):
    model = tiny("gpt2", {}).requires_grad_(False)
    model.set_attn_implementation(how)
    assert _tells_shares(model, find_places(model), IDS) == tells
