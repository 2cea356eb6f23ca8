"""`bov plan --engine vllm`; serving/vllm/tests compares the same numbers with vLLM's own."""

import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from variants import OVERLAYS, make_model

from bov_lightning.cli import main
from bov_lightning.errors import UserError
from bov_lightning.planning.serving import group, layer_pages, pages_plan


def shape(name: str, pattern: str, n_layer: int = 6):
    return make_model(OVERLAYS[name], window_pattern=pattern, n_layer=n_layer).config


@pytest.mark.parametrize(
    ("name", "share"),
    [("bov", Fraction(1, 3)), ("bov_second_half", Fraction(1, 2)), ("bov_every_layer", 1),
     ("standard", 0), ("first_layer", 0), ("bov_add_context", 0)],
)  # fmt: skip
def test_keys_alone_give_as_many_more_blocks_as_there_are_bank_layers(name, share):
    """1 / (1 - f/2) for a share f of the layers; nothing where ids are not enough."""
    config = shape(name, "L")
    stored, keys = (
        pages_plan(config, kind, 10**9, 4096, 16, 2048, 2) for kind in ("stored", "keys")
    )
    assert Fraction(stored.block_bytes, keys.block_bytes) == 1 / (1 - Fraction(share) / 2)
    assert stored.block_bytes == 16 * 6 * 2 * config.d_value * 2
    assert keys.requests == pytest.approx(stored.requests / (1 - share / 2), rel=1e-4)


@settings(max_examples=30)
@given(
    n_layer=some.integers(1, 13), pattern=some.text("SL", min_size=1, max_size=5),
    kind=some.sampled_from(["stored", "keys"]),
)  # fmt: skip
def test_groups_hold_every_layer_once_in_pages_of_one_size(n_layer, pattern, kind):
    if n_layer < 3:
        pattern = "L"
    pages = layer_pages(shape("bov_every_layer", pattern, n_layer), kind, 32, 4)
    groups = group(pages)
    assert sorted(str(p.window) for layers in groups for p in layers) == sorted(
        str(p.window) for p in pages
    )
    for layers in groups:
        assert len({page.window for page in layers}) == 1
        assert len({page.nbytes for page in layers}) == 1


def test_ids_beside_the_pages_are_those_of_all_rows():
    """4 bytes a slot for the token's id, and as many for each row of its value."""
    for name, n_row in {"bov": 1, "ngram_bank": 2, "ngram_bank_position": 2}.items():
        plan = pages_plan(shape(name, "L"), "keys", 10**9, 4096, 16, 2048, 2)
        assert plan.id_bytes == 4 * (plan.blocks * 16 * (1 + n_row) + 1)


def test_what_does_not_fit_says_how_much_does():
    config = shape("bov", "SSSL")
    with pytest.raises(UserError, match="one request of 4,096 tokens needs") as caught:
        pages_plan(config, "stored", 10_000, 4096, 16, 2048, 2)
    needed = int(str(caught.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
    assert pages_plan(config, "stored", needed, 4096, 16, 2048, 2).requests >= 1
    with pytest.raises(UserError):
        pages_plan(config, "stored", needed - 1, 4096, 16, 2048, 2)


def test_the_command_prints_both_kinds(capsys):
    command = ["plan", "--config", "quickstart", "--inference", "--engine", "vllm"]
    assert main([*command, "--memory", "1GB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory"] == 10**9
    assert plan["keys"]["blocks"] / plan["stored"]["blocks"] == pytest.approx(1.2, rel=1e-3)
    assert main([*command, "--memory", "1GB", "--context", "1000"]) == 0
    assert "keys alone where there is a bank" in capsys.readouterr().out
    assert main([*command[:3], "--engine", "vllm"]) == 2
    assert "add --inference" in capsys.readouterr().err
