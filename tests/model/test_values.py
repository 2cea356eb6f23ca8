"""Value sources: what they equal, what they never see, what they store, what they refuse."""

from dataclasses import fields

import pytest
import torch
import yaml
from variants import (
    KINDS,
    OVERLAYS,
    PAPER,
    SMALL,
    VALUES,
    WAYS,
    make_model,
    mostly_slow,
    perturb,
    token_ids,
)

from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.counting import meta_model
from bov_lightning.model.layers import rms_norm
from bov_lightning.model.lookup import source_class
from bov_lightning.model.transformer import Transformer
from bov_lightning.model.values import ValueInputs


@pytest.mark.parametrize("layers", ["last_third", "every", [1, 4]])
@torch.no_grad()
def test_fresh_bank_equals_initial_embedding(layers):
    """The smear mixes the previous token into x0, but not into the table: it is off here."""
    ids = token_ids(300)
    logits = []
    for source in ("bank", "initial_embedding"):
        model = make_model(ValueConfig(source=source, layers=layers, coefficient="learned"))
        logits.append(perturb(model, smear=0.0)(ids))
    assert (logits[0] - logits[1]).abs().max() < 1e-5


@torch.no_grad()
def test_fresh_bank_equals_initial_embedding_before_the_smear():
    """With the smear on, the table still holds W_V of the token's own embedding."""
    values = []
    for source in ("bank", "initial_embedding"):
        model = perturb(make_model(ValueConfig(source=source, coefficient="learned")), smear=0.7)
        model.blocks[5].attention.value.coefficient.fill_(1.3)
        ids = token_ids(20)
        unsmeared = torch.nn.functional.rms_norm(model.embedding(ids), (48,))
        x = torch.randn(2, 20, 48)
        inputs = ValueInputs(x, unsmeared, ids, None, ids[..., None], ids)
        values.append(model.blocks[5].attention.value(inputs))
    assert values[0].norm() > 1
    assert (values[0] - values[1]).abs().max() < 1e-5


@pytest.mark.parametrize("name", mostly_slow(WAYS, KINDS))
@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_logit(name):
    for pattern in ("L", "SSSL"):
        model = perturb(make_model(OVERLAYS[name], window_pattern=pattern), smear=0.9)
        ids = token_ids(200)
        before = model(ids)
        for position in (1, 140, 199):
            changed = ids.clone()
            changed[:, position] = (changed[:, position] + 1) % 70
            after = model(changed)
            assert torch.equal(before[:, :position], after[:, :position])
            assert not torch.equal(before[:, position:], after[:, position:])


@pytest.mark.parametrize("name", mostly_slow(WAYS, KINDS))
@torch.no_grad()
def test_masked_documents_do_not_see_each_other(name):
    """A packed row gives every document the logits that it gets alone; unmasked it does not."""
    model = perturb(make_model(OVERLAYS[name], document_start=0), smear=0.9)
    unmasked = perturb(make_model(OVERLAYS[name]), smear=0.9)
    ids = 1 + token_ids(400, n_row=2, vocab_size=69)
    starts = {0: (0, 3, 150, 151, 399), 1: (0, 200)}
    for row, positions in starts.items():
        ids[row, list(positions)] = 0
    logits, leaking = model(ids), unmasked(ids)
    for row, positions in starts.items():
        for first, end in zip(positions, (*positions[1:], 400), strict=True):
            alone = model(ids[row : row + 1, first:end])[0]
            assert torch.allclose(logits[row, first:end], alone, atol=1e-4)
            assert first == 0 or not torch.allclose(leaking[row, first:end], alone, atol=1e-2)


def test_shared_table_is_stored_and_trained_once():
    model = make_model(OVERLAYS["bov_shared_table"])
    tables = [name for name in model.state_dict() if name.endswith("table")]
    assert tables == ["blocks.4.attention.value.source.table"]
    assert len(model.grouped_parameters()["table"]) == 1
    ids = token_ids(30)
    before = perturb(model, 0.0)(ids)
    with torch.no_grad():
        model.blocks[4].attention.value.source.table.mul_(2)
    both = model(ids)
    with torch.no_grad():
        model.blocks[5].attention.value.coefficient.div_(2)
    assert not torch.equal(before, both)
    assert not torch.equal(both, model(ids))


def test_models_of_one_seed_share_the_weights_that_both_have():
    standard, bank = make_model(OVERLAYS["standard"], 5), make_model(OVERLAYS["bov"], 5)
    own = standard.state_dict()
    common = [name for name in bank.state_dict() if name in own]
    assert len(common) > 30
    for name in common:
        assert torch.equal(own[name], bank.state_dict()[name]), name
    other = make_model(OVERLAYS["standard"], 6).state_dict()
    assert not torch.equal(own["embedding.weight"], other["embedding.weight"])


def theory(name: str, d_model: int) -> float:
    """The standard deviation that the paper's initialisation gives."""
    if name == "embedding.weight":
        return 0.8
    if name == "head.weight":
        return 0.001
    if name.endswith(("output.weight", "smear.strength", "coefficient")):
        return 0.0
    if name == "smear.gate":
        return (1 / 24 / 3) ** 0.5
    if name.endswith("value.gate.weight"):
        return 0.02 / 12**0.5
    bound = (3 / d_model) ** 0.5
    return (0.4 if name.endswith("mlp.input.weight") else 1) * bound / 3**0.5


@pytest.mark.parametrize("name", ["standard", "bov", "value_embedding_gated"])
def test_initialisation_has_the_statistics_of_the_reference(name, shared):
    """Against the reference where it has enough elements to tell, else against theory."""
    from parity import ParityRow

    from bov_lightning.interop.nanochat import convert_config, convert_name

    numbers = ParityRow(shared, name).numbers
    config = convert_config(numbers["meta"]["model_config"])
    models = [Transformer(config, seed) for seed in range(8)]
    expected = {convert_name(theirs): stats for theirs, stats in numbers["init"].items()}
    for parameter, p in models[0].named_parameters():
        pooled = torch.stack([dict(m.named_parameters())[parameter] for m in models])
        found = pooled.std(unbiased=False).item()
        if p.numel() >= 1000:
            assert found == pytest.approx(expected[parameter]["std"], rel=0.05, abs=1e-9), parameter
        else:
            assert found == pytest.approx(theory(parameter, 48), rel=0.1, abs=1e-9), parameter
        if p.numel() == 1:
            assert p.item() == expected[parameter]["mean"], parameter


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"source": "tabel"}, "bank"),
        ({"source": "context", "shared": True}, "shared"),
        ({"source": "first_layer", "shared": True}, "shared"),
        ({"source": "context", "add_context": True}, "add_context"),
        ({"source": "context", "coefficient": "gate"}, "gate"),
        ({"source": "bank", "coefficient": "gate"}, "add_context"),
        ({"source": "first_layer", "layers": [0, 3]}, "layer 0"),
        ({"source": "bank", "layers": []}, "empty"),
        ({"source": "bank", "layers": [2, 2]}, "twice"),
        ({"source": "layer", "source_args": {"layr": 2}}, "did you mean value.source_args.layer"),
        ({"source": "layer", "source_args": {"layer": "quarter"}}, "third or half"),
        ({"source": "layer", "source_args": {"layer": -1}}, "from 0 to 9,999"),
        ({"source": "bank", "source_args": {"rank": 2}}, "there are no settings here"),
        ({"source": "bank", "gate_channels": 6}, "only coefficient: gate has a gate"),
        ({"source": "key", "coefficient": "gate", "add_context": True}, "gate needs source bank"),
    ],
)
def test_impossible_values_are_refused(value, word):
    with pytest.raises(UserError, match=word):
        ValueConfig(**value)


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        ({"value": ValueConfig("bank", [6])}, "layers 0 to 5"),
        ({"value": ValueConfig("bank", [-1])}, "layers 0 to 5"),
        ({"d_model": 50}, "n_head"),
        ({"n_kv_head": 3}, "n_kv_head"),
        ({"window_pattern": "SXL"}, "window_pattern"),
        ({"d_model": 16}, "smear"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_layer": 1, "value": ValueConfig("first_layer", "every")}, "selects no layer"),
        ({"d_model": 36, "n_head": 4}, "even"),
        ({"value": ValueConfig("layer", source_args={"layer": 5})}, "selects no layer of 6"),
        (
            {"value": ValueConfig("layer", [2, 5], source_args={"layer": "third"})},
            "holds 2, but layer reads the value that layer 2 computes",
        ),
        (
            {
                "value": ValueConfig(
                    "bank", "every", "gate", True, gate_channels=25, gate_inputs="x_and_row"
                )
            },
            "gate_channels is 25.* 24 channels",
        ),
    ],
)
def test_impossible_shapes_are_refused(shape, word):
    with pytest.raises(UserError, match=word):
        TransformerConfig(**(SMALL | shape))


def test_named_layer_sets():
    def layers(n_layer, name, source="bank"):
        config = TransformerConfig(n_layer=n_layer, vocab_size=64, value=ValueConfig(source, name))
        return config.target_layers

    assert layers(12, "last_third") == [8, 9, 10, 11]
    assert layers(12, "second_half") == [6, 7, 8, 9, 10, 11]
    assert layers(12, "last_two_thirds") == list(range(4, 12))
    assert layers(5, "every_second") == [0, 2, 4]
    assert layers(3, "every", "first_layer") == [1, 2]
    assert layers(12, [11, 3]) == [3, 11]


@pytest.mark.parametrize("name", [path.stem for path in PAPER])
def test_overlays_are_the_rows_of_the_paper(name, shared):
    from parity import NAMES, read_rows

    assert {path.stem for path in PAPER} == set(NAMES)
    paper = read_rows(shared)["rows"][name]["value"]
    assert set(OVERLAYS[name]) == set(paper)
    assert ValueConfig(**OVERLAYS[name]) == ValueConfig(**paper)


@pytest.mark.parametrize("name", [path.stem for path in VALUES])
def test_overlays_spell_out_the_settings_of_their_source(name):
    """A run holds them all, by which the report knows the overlay."""
    path = next(path for path in VALUES if path.stem == name)
    value = yaml.safe_load(path.read_text())["model"]["config"]["value"]
    assert value.get("source_args", {}) == ValueConfig(**value).source_args


DATA = {"gate_channels", "gate_factor"}
"""Settings that are only numbers to the code: all of them go one way."""


def ways(value: ValueConfig) -> dict[str, object]:
    """By setting, what decides through which lines a variant goes."""
    cls, sums = source_class(value.source), value.add_context
    number = not isinstance(value.coefficient, str)
    defaults = ValueConfig(value.source).source_args
    return {
        "source": (value.source, sums),
        "add_context": sums,
        "coefficient": ("a number" if number else value.coefficient, sums),
        "shared": value.shared,
        "gate_inputs": value.gate_inputs,
        "source_args": {n for n, x in value.source_args.items() if x != defaults[n]},
        "layers": "all" if value.layers == "every" and not cls.skips_first_layer else "some",
    }


def test_every_variant_goes_ways_that_are_tried():
    """A coefficient, a gate or a sum is the same code whatever the source: each is tried once."""
    assert {field.name for field in fields(ValueConfig)} <= {*ways(ValueConfig()), *DATA}
    tried = [ways(ValueConfig(**OVERLAYS[name])) for name in WAYS]
    for name, value in OVERLAYS.items():
        for setting, way in ways(ValueConfig(**value)).items():
            assert way in [others[setting] for others in tried], (name, setting, way)


@torch.no_grad()
def test_first_layer_is_layer_zero():
    """And another layer's value is that layer's own projection of its own stream."""
    ids, first = token_ids(40), make_model(OVERLAYS["first_layer"])
    value = OVERLAYS["layer_third"] | {"source_args": {"layer": 0}}
    assert torch.equal(perturb(make_model(value), 0.5)(ids), perturb(first, 0.5)(ids))
    model, read = perturb(make_model(OVERLAYS["layer_third"]), 0.5), []
    for i in (2, 4, 5):
        hook = model.blocks[i].attention.value.register_forward_hook
        hook(lambda module, inputs, value: read.append((inputs[0], value)))
    model(ids)
    (inputs, own), *others = read
    assert torch.equal(own, model.blocks[2].attention.value.projection(inputs.x))
    for layer, (_, value) in zip((4, 5), others, strict=True):
        assert torch.equal(value, model.blocks[layer].attention.value.coefficient * own)


@torch.no_grad()
def test_values_of_keys_are_keys_without_rotation():
    """Of grouped heads too: a key has the shape of a value. Decoding keeps keys alone."""
    model, read = perturb(make_model(OVERLAYS["key"], n_kv_head=1), 0.5), []
    attention = model.blocks[5].attention
    attention.value.register_forward_hook(lambda module, inputs, value: read.append(
        (inputs[0].x, value)))  # fmt: skip
    model(token_ids(40))
    ((x, value),) = read
    keys = rms_norm(attention.key(x))  # of one head
    assert torch.equal(value, attention.value.coefficient * keys)
    assert attention.value.projection is None
    assert model.new_cache(1, 10).layers[5].values is None


def test_meta_model_has_the_parameters_of_the_real_one():
    model = make_model(OVERLAYS["bov"])
    shapes = {name: p.shape for name, p in meta_model(model.config).named_parameters()}
    assert shapes == {name: p.shape for name, p in model.named_parameters()}
