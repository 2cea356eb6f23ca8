"""Recipes: how files merge, which keys exist, what every recipe builds."""

import copy

import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from variants import PATHS

from bov_lightning.cli import main
from bov_lightning.cli.options import read_given, recipe_parser
from bov_lightning.errors import UserError
from bov_lightning.model.counting import meta_model
from bov_lightning.recipe.given import read
from bov_lightning.recipe.keys import check_keys, known_keys, nearest
from bov_lightning.recipe.overlays import merge, parse_options
from bov_lightning.recipe.sections import Recipe

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))

# An overlay replaces one section whole, whatever the recipe: each meets two of them.
PAIRS = [
    *((path, None) for path in RECIPES),
    *(
        pytest.param(RECIPES[(i + j) % len(RECIPES)], overlay, marks=[pytest.mark.slow] * j)
        for i, overlay in enumerate(PATHS.values())
        for j in (0, 1)
    ),
]

plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.dictionaries(st.sampled_from("abcd"), inner, max_size=4) | st.lists(inner, max_size=3)
    ),
    max_leaves=10,
)
mappings = st.dictionaries(st.sampled_from("abcd"), plain_data, max_size=4)


def read_recipe(path, *options):
    """As a command line gives it."""
    known, others = recipe_parser("fit", "").parse_known_args(["--config", str(path), *options])
    return read_given(known, others)


@given(mappings, mappings, mappings)
def test_merging_is_associative_and_the_last_word_wins(a, b, c):
    assert merge(merge(a, b), c) == merge(a, merge(b, c)) or _mixes_kinds(a, b, c)
    assert merge(a, a) == a
    assert merge(a, {}) == a == merge({}, a)


def _mixes_kinds(*data) -> bool:
    """Whether a key is a mapping in one and something else in another: then order decides."""
    kinds = {}

    def visit(value, path):
        kinds.setdefault(path, set()).add(isinstance(value, dict))
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(inner, (*path, key))

    for value in data:
        visit(value, ())
    return any(len(found) > 1 for found in kinds.values())


def test_a_budget_replaces_the_whole_budget():
    base = {"model": {"budget": {"flops": 1e9}, "config": {"n_layer": 3}}}
    merged = merge(base, {"model": {"budget": {"steps": 5}}})
    assert merged == {"model": {"budget": {"steps": 5}, "config": {"n_layer": 3}}}


def test_another_class_takes_no_arguments_over():
    base = {"data": {"class_path": "A", "init_args": {"x": 1, "y": 2}}}
    assert merge(base, {"data": {"class_path": "B", "init_args": {"x": 3}}}) == {
        "data": {"class_path": "B", "init_args": {"x": 3}}
    }
    assert merge(base, {"data": {"init_args": {"x": 3}}}) == {
        "data": {"class_path": "A", "init_args": {"x": 3, "y": 2}}
    }


def test_plus_extends_a_list():
    base = {"trainer": {"callbacks": [1]}}
    assert merge(base, {"trainer": {"callbacks+": [2]}}) == {"trainer": {"callbacks": [1, 2]}}
    assert merge(base, {"trainer": {"callbacks": [2]}}) == {"trainer": {"callbacks": [2]}}
    assert merge({}, {"trainer": {"callbacks+": [2]}})["trainer"]["callbacks"] == [2]


def test_options_are_an_overlay():
    options = ["--model.config.value.layers", "[1, 2]", "--seed=3", "--run.name", "x y"]
    assert parse_options(options) == {
        "model": {"config": {"value": {"layers": [1, 2]}}}, "seed": 3, "run": {"name": "x y"},
    }  # fmt: skip
    for wrong in (["seed"], ["--seed"]):
        with pytest.raises(UserError):
            parse_options(wrong)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("model.config.n_layers", "model.config.n_layer"),
        ("model.n_layer", "model.config.n_layer"),
        ("model.config.value.sorce", "model.config.value.source"),
        ("modle", "model"),
        ("model.optimizer.matrix_rl", "model.optimizer.matrix_lr"),
        ("batch_tokens", "batch.tokens"),
        ("checkpoint.every_step", "checkpoint.every_steps"),
    ],
)
def test_unknown_keys_name_the_nearest(wrong, meant):
    assert nearest(wrong, known_keys(Recipe)) == meant
    value = 1
    for part in reversed(wrong.split(".")):
        value = {part: value}
    with pytest.raises(UserError, match=f"x.yaml: unknown key .*did you mean {meant}"):
        check_keys(value, "x.yaml")


def test_vocabulary_is_filled_from_the_tokenizer(tmp_path):
    from data_modules.tokenizer import TokenizerConfig, save_tokenizer, train_tokenizer

    null = ["--model.config.vocab_size", "null"]
    recipe = read_recipe("quickstart", *null).recipe
    assert recipe.model.config.vocab_size == 4096
    save_tokenizer(train_tokenizer(["some text"] * 9, TokenizerConfig(vocab_size=260)), tmp_path)
    brought = ["--data.init_args.tokenizer.path", str(tmp_path)]
    recipe = read_recipe("quickstart", *null, *brought).recipe
    assert recipe.model.config.vocab_size == 260


@pytest.mark.parametrize(("path", "overlay"), PAIRS, ids=lambda path: path and path.stem)
def test_every_recipe_builds_with_every_overlay(path, overlay):
    found = read_recipe(path, *(["--config", str(overlay)] if overlay else []))
    recipe, settings = found.recipe, found.plain
    assert recipe.run.name == (f"{path.stem}-{overlay.stem}" if overlay else path.stem)
    assert meta_model(recipe.model.config).flops_per_token() > 0
    if overlay:
        value = yaml.safe_load(overlay.read_text())["model"]["config"]["value"]
        assert settings["model"]["config"]["value"] == value


def test_a_source_begins_with_settings_of_its_own(tmp_path):
    """An overlay that names a source leaves nothing of an earlier one's settings."""
    first = {"source": "layer", "source_args": {"layer": 2}}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump({"model": {"config": {"value": first}}}))
    paths = ["quickstart", str(tmp_path / "first.yaml")]
    key = "--model.config.value."
    assert read(paths).recipe.model.config.value.source_args == {"layer": 2}
    for more in (["values/bov"], ["values/first_layer", "values/value_embedding_gated"]):
        assert read([*paths, *more]).recipe.model.config.value.source_args == {}
    gated = ["values/value_embedding_gated_row", "values/value_embedding_gated"]
    assert read([*paths, *gated]).recipe.model.config.value.gate_channels == 12
    # In whatever order options come.
    options = [f"{key}source_args.layer", "1", f"{key}source", "layer"]
    for order in (options, options[2:] + options[:2]):
        assert read(["quickstart"], order).recipe.model.config.value.source_args == {"layer": 1}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_whole_in_one_file(path):
    """Every field of every section is there."""
    data = yaml.safe_load(path.read_text())
    for key in known_keys(Recipe):
        value = data
        for part in key.split("."):
            if key.startswith(("model.budget.", "resume")) or not isinstance(value, dict):
                break
            assert part in value, f"{path.name} lacks {key}"
            value = value[part]


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shrunken_copy_of_every_recipe_trains_two_steps(path, tiny_settings, workplace):
    """The recipe itself, but for the sizes and the data."""
    data = copy.deepcopy(tiny_settings["data"])
    # What is small is neither cut into the recipe's many parts nor validated whole.
    data["init_args"] |= {"directory": "packed", "n_shard": 1}
    small = {
        "model": {
            "config": {"n_layer": 3, "n_head": 2, "n_kv_head": 2, "d_model": 32,
                       "vocab_size": 300, "sequence_len": 32},
            "budget": {"steps": 2},
        },
        "batch": {"tokens": 256, "micro": 4},
        "validation": {"tokens": 640},
        "compile": False,
        "data": data,
        "trainer": {"accelerator": "cpu"},
    }  # fmt: skip
    (workplace / "small.yaml").write_text(yaml.safe_dump(small))
    assert main(["fit", "--config", str(path), "--config", "small.yaml"]) == 0
    assert (workplace / "runs" / f"{path.stem}-small" / "checkpoints" / "step-00000002").is_dir()


def test_data_names_text_files_or_is_the_section_itself():
    files = ["--data", "a-*.txt", "--data", "c.txt", "--val-data", "b.txt"]
    settings = read_recipe("nano", *files).plain
    arguments = settings["data"]["init_args"]
    assert arguments["source"] == {
        "class_path": "data_modules.TextFiles",
        "init_args": {"train": ["a-*.txt", "c.txt"], "val": ["b.txt"]},
    }
    assert arguments["tokenizer"] == {"vocab_size": 4096}
    # Text of its own is prepared in a directory of its own.
    others = read_recipe("nano", "--data", "c.txt", "--val-data", "b.txt").plain
    directories = {s["data"]["init_args"]["directory"] for s in (settings, others)}
    assert len(directories - {"data/nano"}) == 2

    settings = read_recipe("nano", "--data", "{class_path: data_modules.Other}").plain
    assert settings["data"] == {"class_path": "data_modules.Other"}

    with pytest.raises(UserError, match="--data and --val-data go together"):
        read_recipe("nano", "--data", "a.txt")
