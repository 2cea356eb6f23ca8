"""`bov plan` and the memory of a device: against what training takes, and against arithmetic."""

import json
from functools import cache

import measure_memory
import pytest
import torch
from processes import in_processes

from bov_lightning.cli import main
from bov_lightning.distributed.layout import Layout, read_layout
from bov_lightning.errors import UserError
from bov_lightning.model.attention import _band_mask, _window_mask
from bov_lightning.model.counting import count_parameters
from bov_lightning.model.transformer import Transformer
from bov_lightning.planning import memory
from bov_lightning.planning.devices import parse_bytes
from bov_lightning.planning.memory import KINDS, host_memory, plan_memory
from bov_lightning.recipe.budget import accumulation
from bov_lightning.recipe.building import build
from bov_lightning.recipe.overlays import merge
from bov_lightning.recipe.sections import Recipe

# Nothing divides by 3, and a padded vocabulary of 1,024 rows is the most of it.
SETTINGS = {
    "model": {
        "config": {
            "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 64, "vocab_size": 1000,
            "sequence_len": 256, "window_pattern": "SL",
            "value": {
                "source": "bank", "layers": "every", "coefficient": "learned",
                "add_context": False, "shared": False,
            },
        },
        "budget": {"steps": 2},
    },
    "batch": {"tokens": 4096, "micro": 2},
    "trainer": {"accelerator": "cpu"},
}  # fmt: skip


def recipe_of(*overlays: dict) -> Recipe:
    settings = SETTINGS
    for overlay in overlays:
        settings = merge(settings, overlay)
    return build(Recipe, settings, "test")


def plan(*overlays: dict, world: int = 1) -> dict:
    return _plan(json.dumps(overlays), world)


@cache
def _plan(overlays: str, world: int) -> dict:
    recipe = recipe_of(*json.loads(overlays))
    layout = read_layout(recipe.trainer, world)
    # Not what batch.tokens says: the micro-steps are the same on any number of devices.
    return plan_memory(recipe, layout, n_micro=2)


def trainer(**keys) -> dict:
    return {"trainer": keys}


def weights(table: bool) -> list[torch.nn.Parameter]:
    groups = Transformer(recipe_of().model.config).grouped_parameters()
    return [p for name, group in groups.items() for p in group if (name == "table") == table]


def test_one_device_holds_what_the_parameters_say():
    """fp32: 4 bytes; AdamW keeps two numbers per weight, Muon one and one per row or column."""
    found = plan()
    rest, tables = weights(False), weights(True)
    assert found["parameters"] == found["gradients"] == sum(4 * p.numel() for p in rest)
    assert found["tables"] == sum(16 * p.numel() + 4 for p in tables)
    groups = Transformer(recipe_of().model.config).grouped_parameters()
    matrices = groups.pop("matrix")
    adamw = [p for name, group in groups.items() if name != "table" for p in group]
    expected = sum(8 * p.numel() + 4 for p in adamw)  # and the step
    expected += sum(4 * p.numel() + 4 * max(p.shape) for p in matrices)
    assert found["optimizer"] == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 8])
def test_sharding_divides_parameters_gradients_optimizer_and_tables(world):
    one, many = plan(), plan(world=world)
    for kind in ("parameters", "gradients", "optimizer", "tables"):
        n_parameter = len(weights(table=kind == "tables"))
        # A row of padding per parameter at most, in each of up to four copies; and the steps.
        padding = 4 * n_parameter * (4 * 4 * 64 + 64)
        assert one[kind] / world <= many[kind] <= one[kind] / world + padding, kind
        assert many[kind] < 0.8 * one[kind]
    assert many["activations"] == pytest.approx(one["activations"], rel=0.05)


@pytest.mark.slow
def test_copies_hold_what_their_shards_hold():
    strategy = {"class_path": "bov_lightning.ShardedStrategy"}
    copies = trainer(strategy={**strategy, "init_args": {"replicate": 2}})
    found, expected = plan(copies, world=4), plan(world=2)
    for kind in ("parameters", "gradients", "optimizer", "tables", "activations"):
        assert found[kind] == expected[kind], kind


def test_ddp_holds_everything_and_its_messages():
    one, ddp = plan(), plan(trainer(strategy="ddp"), world=8)
    for kind in ("parameters", "optimizer", "tables", "activations"):
        assert ddp[kind] == one[kind], kind
    assert ddp["gradients"] == 2 * one["gradients"] + sum(4 * p.numel() for p in weights(True))
    assert ddp["peak"] > one["peak"]


@pytest.mark.slow
def test_activations_follow_micro_checkpointing_and_precision():
    micro = {"batch": {"micro": 4}}
    recompute = {"activation_checkpointing": True}
    half = trainer(precision="bf16-mixed")
    one = plan()["activations"]
    # Masks and rotary angles are there once.
    assert plan(micro)["activations"] == pytest.approx(2 * one, rel=0.1)
    assert plan(recompute)["activations"] < 0.9 * one
    # On a CPU norms of bf16 numbers keep fp32 ones, so that bf16 alone saves nothing at this size;
    # autocast keeps fp32 and bf16 of what it casts.
    cast = trainer(precision="bf16-mixed", strategy="ddp")
    assert plan(half)["activations"] < plan(cast)["activations"]
    # Copies that stay until the step ends are none.
    assert plan(half, world=2)["activations"] == plan(half)["activations"]


def test_tables_are_counted_apart():
    standard = {"model": {"config": {"value": {"source": "context"}}}}
    shared = {"model": {"config": {"value": {"shared": True}}}}
    assert plan(standard)["tables"] == 0
    assert 2 * plan(shared)["tables"] == plan()["tables"]
    assert plan(shared)["parameters"] == plan()["parameters"]


def test_tables_on_the_host_are_counted_there():
    """On the device, rows of a micro-step and their gradients: at most one for each that is read;
    on the host, table, moments and counts, and the gradients of a step's rows."""
    ngrams = {"source": "ngram_bank", "source_args": {"n_row": 20_000, "reach": 2}}
    overlay = {"tables_on": "host", "model": {"config": {"value": ngrams}}}
    found = plan(overlay)
    width, n_read, n_row = 32, 2 * 256 * 3, 1024 + 19_997
    assert found["tables"] == 2 * 4 * 2 * n_read * width
    assert found["parameters"] == plan()["parameters"]
    for world in (1, 2):
        once, often = (host_memory(recipe_of(overlay), Layout(world), n) for n in (1, 100))
        n_own = -(-n_row // world)
        assert once["tables"] == once["checkpoint"] == 4 * 2 * n_own * (3 * width + 1)
        assert once["gradients"] == 4 * 2 * n_read * width
        assert often["gradients"] == 4 * 2 * n_row * width


def test_gradients_live_through_the_forward_pass_with_and_without_accumulation():
    """Lightning frees those of the last step after the forward pass, which has the peak here."""
    recipe = recipe_of({"batch": {"micro": 32}})
    once, often = (plan_memory(recipe, Layout(), n_micro) for n_micro in (1, 4))
    assert once["peak_in"] == often["peak_in"] == "forward"
    assert once["peak"] == often["peak"]
    kept = sum(once[kind] for kind in ("parameters", "gradients", "optimizer", "tables"))
    assert once["peak"] > kept + 0.9 * once["activations"]


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_value_variants_have_a_plan(accelerator):
    from variants import OUTSIDE, PAPER, PATHS

    from bov_lightning.recipe.overlays import read_yaml

    for path in (*PAPER[::5], *(PATHS[name] for name in OUTSIDE)):
        found = plan(read_yaml(path), trainer(accelerator=accelerator), world=2)
        tables = count_parameters(recipe_of(read_yaml(path)).model.config).tables
        # Table, gradient and two moments in fp32, half of each on one of two ranks.
        assert found["tables"] == pytest.approx(4 * 4 * tables / 2, rel=0.01, abs=64), path
        assert found["peak"] <= sum(found[kind] for kind in KINDS), path


@pytest.mark.slow
def test_the_simulation_leaves_nothing_behind():
    plan(world=2)
    assert not torch.distributed.is_initialized()
    model, rows = Transformer(recipe_of().model.config), torch.zeros(1, 257, dtype=torch.int64)
    assert torch.isfinite(model(rows[:, :-1], rows[:, 1:]))
    for mask, sizes in ((_window_mask, (128, 128)), (_band_mask, (128, 256, 128))):
        assert type(mask(*sizes, torch.device("cpu"))) is torch.Tensor


@pytest.mark.slow
@pytest.mark.parametrize(
    "overlay",
    [
        {"model": {"config": {"document_start": 0}}},
        {"model": {"config": {"value": {"coefficient": "gate", "add_context": True}}}},
        {"model": {"config": {"value": {"source": "first_layer", "coefficient": 0.5}}}},
        {"activation_checkpointing": True, "batch": {"micro": 8}},
        {"trainer": {"accelerator": "gpu"}, "batch": {"micro": 32}},
        {"trainer": {"accelerator": "gpu", "strategy": "ddp"}},
    ],
)
def test_tensors_on_the_meta_device_need_what_fake_ones_need(overlay, monkeypatch):
    recipe = recipe_of(overlay)
    layout = read_layout(recipe.trainer, 2 if "strategy" in recipe.trainer else 1)
    found = [plan_memory(recipe, layout, n_micro) for n_micro in (1, 4)]
    monkeypatch.setattr(memory, "_meta_device", lambda recomputes: memory._fake_ranks(layout))
    assert found == [plan_memory(recipe, layout, n_micro) for n_micro in (1, 4)]


def test_world_size_comes_from_the_recipe():
    def world(**keys) -> int:
        return read_layout({"accelerator": "cpu", **keys}).world_size

    assert world() == 1
    assert world(devices=4, num_nodes=3) == 12
    assert world(devices=[0, 2]) == world(devices="0,2") == world(devices="2") == 2
    assert read_layout({"devices": 4}, 16).world_size == 16


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"strategy": "deepspeed"}, "deepspeed"),
        ({"precision": "16-true"}, "precision 16-true"),
        ({"strategy": "ddp", "precision": "64-true"}, "precision 64-true"),
        ({"strategy": {"class_path": "ShardedStrategy", "init_args": {"replicate": 3}}}, "copies"),
    ],
)
def test_what_cannot_be_planned_is_refused(section, message):
    with pytest.raises(UserError, match=message):
        read_layout(section, 4)


def test_sizes_of_devices():
    assert parse_bytes("80GB") == 80 * 10**9
    assert parse_bytes("79.5 GiB") == int(79.5 * 2**30)
    assert parse_bytes("1234") == parse_bytes("1234b") == 1234
    for text in ("80 apples", "", "-1GB", "GB"):
        with pytest.raises(UserError, match="such as 80GB"):
            parse_bytes(text)


@pytest.mark.slow
def test_command_prints_the_plan_and_fails_when_it_does_not_fit(tiny_recipe, capsys):
    command = ["plan", "--config", str(tiny_recipe), "--devices", "2"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["memory_per_device"]
    assert set(found) == {*KINDS, "peak", "peak_in"}
    assert main([*command, "--memory", str(found["peak"])]) == 0
    assert "tables" in capsys.readouterr().out
    assert main([*command, "--json", "--memory", str(found["peak"] - 1)]) == 2
    out, error = capsys.readouterr()
    assert json.loads(out)["memory_per_device"] == found
    assert error.count("\n") == 1
    for advice in ("activation_checkpointing true", "batch.micro below 4", "more devices than 2"):
        assert advice in error


LARGE_TABLES = {
    "model": {
        "config": {
            "n_layer": 3, "d_model": 256, "n_kv_head": 4, "vocab_size": 12288, "sequence_len": 128,
            "window_pattern": "L", "value": {"layers": "every"},
        },
    },
    "batch": {"tokens": 1024, "micro": 4},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "tables_on", "precision"),
    [(1, "device", "32-true"), (1, "device", "bf16-mixed"), (2, "device", "32-true"),
     (2, "host", "32-true")],
)  # fmt: skip
def test_plan_is_what_training_takes(world, tables_on, precision):
    """Within 15%; the tables are half of a rank's memory and more."""
    changed = LARGE_TABLES | {"tables_on": tables_on, "trainer": {"precision": precision}}
    settings = merge(SETTINGS, changed)
    recipe = build(Recipe, settings, "test")
    layout = read_layout(recipe.trainer, world)
    n_micro = accumulation(recipe.batch.tokens, recipe.batch.micro, 128, world)
    planned = plan_memory(recipe, layout, n_micro)["peak"]
    if tables_on == "host":  # which the device is here, too
        on_host = host_memory(recipe, layout, n_micro)
        planned += on_host["tables"] + on_host["gradients"]
    for measured in in_processes(world, measure_memory.peak, settings):
        assert measured == pytest.approx(planned, rel=0.15)
