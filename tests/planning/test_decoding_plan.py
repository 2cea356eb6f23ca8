"""`bov plan --inference`: equal to what real caches take, and to the paper's break-even."""

import json

import pytest
import torch
from variants import OVERLAYS, make_model

from bov_lightning.cli import main
from bov_lightning.planning.decoding import inference_plan


@pytest.mark.parametrize(
    "name", ["standard", "bov", "first_layer_every", "bov_shared_table", "ngram_bank"]
)
def test_planned_bytes_are_those_of_real_tensors(name):
    model = make_model(OVERLAYS[name])
    plan = inference_plan(model.config, 3, 700)
    cache = model.new_cache(3, 700, dtype=torch.bfloat16)
    assert plan["cache_bytes"]["this"] == cache.nbytes
    assert plan["cache_bytes_per_layer"] == cache.nbytes_per_layer
    tables = model.grouped_parameters().get("table", [])
    assert plan["table_bytes"] == sum(table.numel() for table in tables) * 2
    assert plan["weight_bytes"]["this"] == sum(p.numel() for p in model.parameters()) * 2


@pytest.mark.slow
def test_the_780m_shape_breaks_even_where_the_paper_says(capsys):
    command = ["plan", "--config", "bov-780m", "--inference", "--context", "32768", "--json"]
    assert main(command) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["break_even"]["cached_tokens_full_caches"] == 32768
    assert 0.218 < plan["fraction_of_full_standard"] < 0.23
    assert plan["table_bytes"] == 2 * 8 * 32768 * 1536
    # Two of the eight bank layers see everything; the others save little more than a window.
    assert 3.9 * 32768 < plan["break_even"]["cached_tokens_window_caches"] <= 4 * 32768
    reads = plan["read_bytes_per_step"]
    assert reads["this"] < reads["full_standard"]

    assert main([*command[:-3], "--batch", "16", "--context", "65536"]) == 0
    out = capsys.readouterr().out
    for text in ("16 x 65,536", "window caches", "32,768 cached tokens", "tokens/s"):
        assert text in out


def test_standard_values_have_no_tables_to_pay_off(capsys):
    options = ["--config", "bov-135m", "--config", "values/standard", "--inference", "--json"]
    assert main(["plan", *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["context"] == 20480
    assert plan["table_bytes"] == 0
    assert set(plan["break_even"].values()) == {None}
    assert plan["cache_bytes"]["this"] == plan["cache_bytes"]["standard"]


@pytest.mark.slow
def test_the_plot_is_drawn(workplace):
    command = ["plan", "--config", "quickstart", "--inference", "--plot"]
    assert main([*command, "cache.png"]) == 0
    assert (workplace / "cache.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--batch", "0"], "--batch"),
        (["--context", "-5"], "--context"),
        (["--bandwidth", "0"], "--bandwidth"),
        (["--plot", "cache.txt"], "--plot"),
    ],
)
def test_impossible_questions_are_refused(capsys, workplace, options, word):
    assert main(["plan", "--config", "quickstart", "--inference", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert word in captured.err
