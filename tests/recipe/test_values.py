"""What a key may hold: text as it is written, homes, ranges, YAML that loses nothing."""

import dataclasses
import inspect
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_modules
from bov_lightning.cli import main
from bov_lightning.distributed.strategy import ShardedStrategy
from bov_lightning.errors import UserError
from bov_lightning.inference.sampling import Sampling
from bov_lightning.kinds import ENDLESS, Range, home, options_of, range_of
from bov_lightning.launch.submit import JobConfig
from bov_lightning.recipe import given as recipes
from bov_lightning.recipe.annotations import (
    TRAINER,
    dataclass_of,
    element_of,
    hints_of,
    is_free_text,
    is_local_path,
    is_number,
)
from bov_lightning.recipe.data_module import data_section
from bov_lightning.recipe.explained import listing
from bov_lightning.recipe.overlays import parse_options, read_yaml
from bov_lightning.recipe.sections import Recipe
from bov_lightning.recipe.settling import settle
from bov_lightning.recipe.yaml_text import parse_yaml


def read(*options: str, **more: Any):
    return recipes.read(["quickstart"], list(options), **more)


def leaves(cls: type, path: str = "") -> list[tuple[str, Any]]:
    """(dotted key, annotation) of a dataclass's fields and those of the sections in it."""
    found = []
    for name, annotation in hints_of(cls).items():
        here = f"{path}.{name}".lstrip(".")
        section = dataclass_of(annotation)
        found += leaves(section, here) if section else [(here, annotation)]
    return found


KEYS = leaves(Recipe)
OURS = [
    *(getattr(data_modules, name) for name in data_modules.__all__), ShardedStrategy, Sampling,
    JobConfig,
]  # fmt: skip
NUMBERS = [
    *((key, annotation) for key, annotation in KEYS if is_number(annotation)),
    *((f"trainer.{key}", annotation) for key, annotation in TRAINER.items()),
]
TEXTS = [key for key, annotation in KEYS if is_free_text(annotation)]


@pytest.mark.parametrize("cls", [Recipe, *OURS], ids=lambda cls: cls.__name__)
def test_every_number_has_a_range(cls):
    own = leaves(cls) if dataclasses.is_dataclass(cls) else list(hints_of(cls).items())
    names = {name for name, _ in own}
    if not dataclasses.is_dataclass(cls):
        assert names == set(inspect.signature(cls).parameters), "an argument without a type"
    for name, annotation in own:
        assert not is_number(annotation) or range_of(annotation) is not None, name
        found = range_of(annotation)
        assert found is None or (found.least is None) != (found.above is None), name


NOWHERE = [math.nan, math.inf, -math.inf, 10**400, -(10**400)]
"""Numbers in no range."""


def numbers_beyond(within: Range, whole: bool) -> list[Any]:
    """What lies just beyond the ends."""
    first = within.above if within.least is None else within.least
    step = 1 if whole else 1e-9
    below = first if within.least is None else first - (step if abs(first) < 1e3 else 1)
    last = [] if within.most is None else [within.most + (1 if whole else 1e-3 * within.most)]
    return [below, *last]


@pytest.mark.parametrize(("key", "annotation"), NUMBERS, ids=[key for key, _ in NUMBERS])
def test_numbers_beyond_their_range_are_refused_with_it(key, annotation):
    """On the command line; what lies in no range, to the function that refuses there."""
    within, kinds = range_of(annotation), options_of(annotation)
    for value in [*numbers_beyond(within, float not in kinds), *NOWHERE]:
        shown = [value] if element_of(annotation) is not None else value
        text = yaml.safe_dump(shown, default_flow_style=True).removesuffix("...\n").strip()
        with pytest.raises(UserError) as refused:  # noqa: PT012 (one of two)
            if value in NOWHERE and within.most is not None:
                settle(shown, annotation, key)
            else:
                read(f"--{key}", text)
        assert key in str(refused.value), value
        if isinstance(value, int):
            low = within.above if within.least is None else within.least
            end = within.most if value > low else low
            assert "too large" in str(refused.value) or f"{end:,}" in str(refused.value), value
            assert within.most is None or f"{end:,}" in str(refused.value), value


@pytest.mark.parametrize(("key", "annotation"), NUMBERS, ids=[key for key, _ in NUMBERS])
def test_the_ends_of_a_range_belong_to_it(key, annotation):
    within = range_of(annotation)
    whole = float not in options_of(annotation)
    ends = [within.least if within.above is None else 1 if whole else 1e-30, within.most]
    for end in filter(None, ends):
        assert settle(end, annotation, key) == end


NAMES = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co", "Zl", "Zp", "Cf", "Zs"),
                  exclude_characters="/"),
    min_size=1, max_size=40,
).filter(lambda name: name not in (".", "..", "null") and name.isprintable())  # fmt: skip


@given(NAMES)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_printable_name_is_that_name(name):
    for options in (["--run.name", name], [f"--run.name={name}"]):
        assert parse_options(options) == {"run": {"name": name}}
    stored = yaml.safe_dump({"run": {"name": name}}, allow_unicode=True)
    assert parse_yaml(stored.encode(), "x.yaml") == {"run": {"name": name}}


LOOKS_LIKE_MORE = (
    "exp #2", "no", "~", "2026-11-26", "1:30", "4938123", "12_5", "010", "1e3", ".inf", "[a]",
    "{a: b}", "a: b", "*x", "&x", "!x", "- a", '"q"', "yes", "0x1f", "Null",
)  # fmt: skip


@pytest.mark.parametrize("text", LOOKS_LIKE_MORE)
def test_text_that_yaml_would_read_as_something_else(text, workplace):
    assert read("--run.name", text).recipe.run.name == text
    (workplace / "x.yaml").write_text(yaml.safe_dump({"run": {"name": text}}))
    assert recipes.read(["quickstart", "x.yaml"]).recipe.run.name == text
    given_ = read("--data.init_args.source", "{class_path: data_modules.TextFiles, init_args: "
                  "{train: [a.txt], val: [b.txt]}}", "--data.init_args.source.init_args.column",
                  text, "--data.init_args.directory", f"x{text}")  # fmt: skip
    arguments = data_section(given_)["init_args"]
    assert arguments["source"]["init_args"]["column"] == text
    assert arguments["directory"] == f"x{text}"


@pytest.mark.parametrize("written", ["2026-11-26", "no", "12_5", "0x1f", "1.5"])
def test_files_must_quote_what_is_text(written, workplace):
    (workplace / "x.yaml").write_text(f"run: {{name: {written}}}\n")
    with pytest.raises(UserError, match="x.yaml: run.name must be text.*in quotes"):
        recipes.read(["quickstart", "x.yaml"])


@pytest.mark.parametrize("key", [*TEXTS, "data.init_args.directory", "batch.micro", "model"])
def test_an_empty_option_is_a_mistake(key):
    for empty in ("", "  "):
        with pytest.raises(UserError, match=f"--{key} is empty"):
            read(f"--{key}", empty)


def test_null_is_null_where_a_key_can_be():
    assert read("--run.name", "null").recipe.run.name == "quickstart"
    assert read("--run.root", "null").recipe.run.root == "null"


def test_lists_of_text_are_text():
    tasks = read("--evaluation.tasks", "[a, no, 1:30, 2026-11-26]").recipe.evaluation.tasks
    assert tasks == ["a", "no", "1:30", "2026-11-26"]
    assert read("--evaluation.tasks", "heldout").recipe.evaluation.tasks == ["heldout"]
    with pytest.raises(UserError, match="--evaluation.tasks .a, b: give a list"):
        read("--evaluation.tasks", "[a, b")


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\nb", "\x07", "x" * 201, "\udce9"])
def test_names_that_no_folder_can_have(name):
    with pytest.raises(UserError, match="run.name"):
        read("--run.name", name)


PATHS = [key for key, annotation in KEYS if is_local_path(annotation)]


def test_the_home_is_the_home_in_every_path(workplace, monkeypatch):
    monkeypatch.setenv("HOME", str(workplace))
    assert PATHS == ["run.root", "run.reference", "evaluation.data_dir", "evaluation.include_path"]
    for key in PATHS:
        section, name = key.split(".")
        for options in ([f"--{key}", "~/x"], [f"--{section}", f"{{{name}: ~/x}}"]):
            found = getattr(getattr(read(*options).recipe, section), name)
            assert found == f"{workplace}/x", key
        assert getattr(getattr(read(f"--{key}", "./~x").recipe, section), name) == "./~x"
        with pytest.raises(UserError, match=f"{key} ~nobody-here/x: there is no home"):
            read(f"--{key}", "~nobody-here/x")
    assert read("--run.name", "~").recipe.run.name == "~"
    assert read("--run.root", "$HOME/x").recipe.run.root == "$HOME/x"

    (workplace / "own.yaml").write_text("seed: 7\n")
    text = {"data": ["~/t-*.txt"], "val_data": ["~/v.txt"]}
    found = recipes.read(
        ["quickstart", "~/own.yaml"], ["--data.init_args.directory", "~/packed"], **text
    )
    assert found.recipe.seed == 7
    arguments = data_section(found)["init_args"]
    assert arguments["directory"] == f"{workplace}/packed"
    assert arguments["source"]["init_args"] == {
        "train": [f"{workplace}/t-*.txt"], "val": [f"{workplace}/v.txt"],
    }  # fmt: skip


def test_data_sections_in_files_know_the_home_too(workplace, monkeypatch):
    monkeypatch.setenv("HOME", str(workplace))
    (workplace / "x.yaml").write_text(
        "data: {init_args: {directory: ~/d, tokenizer: {path: ~/t}, source: {class_path: "
        "data_modules.TextFiles, init_args: {train: [~/a, hf://b], val: [~/c]}}}}\n"
        "model: {config: {vocab_size: 300}}\n"
    )
    arguments = data_section(recipes.read(["quickstart", "x.yaml"]))["init_args"]
    assert arguments["directory"] == f"{workplace}/d"
    assert arguments["tokenizer"]["path"] == f"{workplace}/t"
    source = arguments["source"]["init_args"]
    assert source == {"train": [f"{workplace}/a", "hf://b"], "val": [f"{workplace}/c"]}


@given(st.text(max_size=20))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_only_a_leading_tilde_is_a_home(text):
    if not text.startswith("~"):
        assert home(text) == text
    assert home("~") == os.path.expanduser("~")


def arguments_of_commands(workplace: Path) -> list[list[str]]:
    checkpoint, out = "~/run", "~/out"
    return [
        ["validate", checkpoint], ["evaluate", checkpoint], ["generate", checkpoint],
        ["export", checkpoint, "--output", out], ["import", "hf", checkpoint, "--output", out],
        ["report", checkpoint, "--output", out], ["fit", "--config", "~/r.yaml"],
        ["evaluate", str(workplace), "--compare", checkpoint],
        ["generate", str(workplace), "--prompts", "~/prompts"],
    ]  # fmt: skip


def test_commands_look_for_paths_in_the_home(workplace, monkeypatch, capsys):
    """Nothing lies there: each says where it looked."""
    monkeypatch.setenv("HOME", str(workplace / "home"))
    for arguments in arguments_of_commands(workplace):
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        if arguments[:2] not in (["fit", "--config"], ["evaluate", str(workplace)]):
            assert f"{workplace}/home/" in said, arguments
    assert not (workplace / "~").exists()


TWICE = [
    ("model:\n  config: {n_layer: 3}\nmodel:\n  config: {}\n", "model", 1, 3),
    ("model:\n  config:\n    n_layer: 3\n    d_model: 64\n    n_layer: 4\n", "n_layer", 3, 5),
    ("data:\n  init_args:\n    list:\n    - a: 1\n      a: 2\n", "a", 4, 5),
    ("run:\n  <<: {root: a}\n  <<: {root: b}\n", "<<", 2, 3),
    ("seed: 1\n'seed': 2\n", "seed", 1, 2),
    ("run: {name: a, root: b,\n  name: c}\n", "name", 1, 2),
]


@pytest.mark.parametrize(("text", "key", "first", "second"), TWICE)
def test_a_key_that_is_given_twice(text, key, first, second, workplace):
    (workplace / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=f"x.yaml .*{key} is given twice, in lines {first} and "
                       f"{second}"):  # fmt: skip
        read_yaml(Path("x.yaml"))


def test_a_merged_mapping_may_be_overridden():
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\nc: {<<: [*a, {z: 1}]}\n"
    assert parse_yaml(text, "") == yaml.safe_load(text)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow
@given(st.dictionaries(st.text(min_size=1), trees, max_size=5), st.booleans(), st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_yaml_writes_is_read_as_yaml_reads_it(data, flow, mark):
    text = yaml.safe_dump(data, default_flow_style=flow, allow_unicode=True)
    blob = ("\ufeff" if mark else "").encode() + text.encode()
    assert parse_yaml(blob, "x") == yaml.safe_load(text)


NINE = "[" + ", ".join(["*{0}"] * 9) + "]"
BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} {NINE.format(f'a{i - 1}')}\n" for i in range(1, 9)
)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b" \n\n", "it is empty"),
        (b"a: 1\n\tb: 2\n", "line 2, column 1: a tab"),
        (b"a: 1\n---\nb: 2\n", "line 2, column 1: a second document starts"),
        (b"seed: 3 # caf\xe9\n", "byte 13 is no UTF-8"),
        ("seed: 3".encode("utf-16"), "byte 0 is no UTF-8"),
        (b"seed: \x00", "U\\+0000"),
        (BOMB.encode(), "more than 100,000 values"),
        (b"a: &a [*a]\n", "an alias stands for what it is part of"),
        (b"[" * 1000, "nested too deeply"),
        (b"a: *b\n", "undefined alias"),
        (b"a: !!python/object/apply:os.getcwd []\n", "python/object"),
        (b"seed: 010\n", "010 would be the number 8"),
        (b"seed: 1:30\n", "1:30 would be the number 90"),
        (b"? [a]\n: 1\n", "a key must be text"),
        (b"seed: " + b"9" * 5000, "cannot be read"),
        (b"- a\n", "must be a mapping"),
    ],
)
def test_files_that_mean_less_than_they_say(content, words, workplace):
    (workplace / "x.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"x.yaml .*{words}"):
        read_yaml(Path("x.yaml"))


def test_a_mark_at_the_start_and_comments_alone_are_fine(workplace):
    for content, value in ((b"\xef\xbb\xbfseed: 3\n", {"seed": 3}), (b"# nothing\n", {})):
        (workplace / "x.yaml").write_bytes(content)
        assert read_yaml(Path("x.yaml")) == value


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").rglob("*.yaml")), ids=str)
def test_recipes_of_the_package_read_as_before(path):
    assert read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_sections_that_are_empty_do_not_lose_what_was_there(workplace):
    for key in ("run", "model", "trainer"):
        (workplace / "x.yaml").write_text(f"{key}:\n")
        with pytest.raises(UserError, match=f"x.yaml: {key} is empty"):
            recipes.read(["quickstart", "x.yaml"])


def test_arguments_given_before_their_class_are_kept():
    source = ["--data.init_args.source.init_args.column", "x", "--data.init_args.source.class_path",
              "data_modules.TextFiles"]  # fmt: skip
    for options in (source, source[2:] + source[:2]):
        found = read(*options).plain["data"]["init_args"]["source"]
        assert found == {"class_path": "data_modules.TextFiles", "init_args": {"column": "x"}}


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("modle", "did you mean --model?"),
        ("nothing_like_it", "unknown option --nothing_like_it"),
        ("xyz.abc", "the nearest is"),
        ("model.xyz", "unknown key model.xyz"),
        ("lr", "unknown option --lr"),
        ("trainer.devces", "did you mean trainer.devices?"),
    ],
)
def test_unknown_keys_are_one_short_line(key, words, tiny_recipe, capsys):
    assert main(["fit", "--config", str(tiny_recipe), f"--{key}", "1"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "bov fit --keys" in said
    assert len(said) < 200


def test_keys_say_their_ranges():
    text = listing(100)
    for key, annotation in KEYS:
        within = range_of(annotation)
        assert within is None or str(within) in text.partition(f"--{key} ")[2].partition("\n")[0]


def test_runs_from_before_there_were_ranges_still_load(workplace):
    """Training on with such a number is refused."""
    from bov_lightning.recipe.given import read_stored

    stored = REPOSITORY / "tests" / "stored" / "0.1.0" / "run" / "config.yaml"
    old = yaml.safe_load(stored.read_text())
    old["model"]["optimizer"] |= {"warmdown_fraction": 65, "warmup_steps": -3, "matrix_lr": -1.0}
    old["model"]["config"]["document_start"] = -7
    old["seed"] = -1
    old["guard"]["spike_deviations"] = math.inf
    (workplace / "config.yaml").write_text(yaml.safe_dump(old))
    found = read_stored(workplace / "config.yaml").recipe
    assert found.model.optimizer.warmdown_fraction == 65
    assert (found.seed, found.model.config.document_start) == (-1, -7)
    with pytest.raises(UserError, match="command line: batch.micro is 0: at least 1"):
        read_stored(workplace / "config.yaml", options=["--batch.micro", "0"])
    with pytest.raises(
        UserError, match="config.yaml: .*(document_start|warmdown_fraction|spike_dev)"
    ):
        recipes.read(["config.yaml"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--temperature", "nan"], "--temperature is nan: a finite number"),
        (["generate", "x", "--seed", str(2**70)], "--seed is"),
        (["generate", "x", "--seed", "-1"], "--seed is -1: from 0"),
        (["generate", "x", "--top-p", "2"], "--top-p is 2.0: above 0, at most 1"),
        (["generate", "x", "--top-k", "0"], "--top-k is 0: at least 1"),
        (["generate", "x", "--batch-size", "0"], "--batch-size is 0: at least 1"),
        (["generate", "x", "--max-new-tokens", "-1"], "--max-new-tokens is -1: at least 1"),
        (["generate", "x", "--max-context", "0"], "--max-context is 0: at least 1"),
        (["generate", ""], "is empty"),
        (["evaluate", "x", "--time-limit", "inf"], "--time-limit is inf: a finite number"),
        (["evaluate", "x", "--max-per-task", "0"], "--max-per-task is 0: at least 1"),
        (["evaluate", "x", "--poll-seconds", "nan"], "--poll-seconds is nan"),
        (["evaluate", "x", "--output", ""], "--output: it is empty"),
        (["plan", "--config", "nano", "--devices", "0"], "--devices is 0: at least 1"),
        (["plan", "--config", "nano", "--bandwidth", "0"], "--bandwidth is 0.0: above 0"),
        (["plan", "--config", "nano", "--batch", str(2**60)], "--batch is"),
        (["prepare", "--config", "nano", "--shard", "²/4"], "--shard"),
        (["prepare", "--config", "nano", "--processes", "0"], "--processes is 0: at least 1"),
        (["sweep", "--config", "nano", "--values", "bov", "--seeds", "²"], "--seeds ²: give whole"),
        (["sweep", "--config", "nano", "--values", "bov", "--seeds", str(2**32)], "--seeds: 42949"),
        (["submit", "--config", "nano", "--nodes", "0", "--dry-run"], "--nodes is 0: at least 1"),
        (["submit", "--config", "nano", "--gpus-per-node", "-1"], "--gpus-per-node is -1: from 0"),
        (["submit", "--config", "nano", "--partition", ""], "--partition is empty"),
        (["submit", "--config", "nano", "--nods", "2"], "did you mean --nodes?"),
        (["generate", "x", "--temprature", "2"], "did you mean --temperature?"),
        (["fitt"], "did you mean fit?"),
        (["zzz"], "bov --help lists them"),
    ],
)  # fmt: skip
def test_options_of_commands_have_ranges_too(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_ranges_say_what_is_wrong():
    assert Range(1, ENDLESS).refusal(0) == "is 0: at least 1"
    assert Range(1, ENDLESS).refusal(10**40) == f"is too large: at most {ENDLESS:,}"
    assert Range(above=0, most=1).refusal(0) == "is 0: above 0, at most 1"
    assert Range(0, 1).refusal(math.nan) == "is nan: a finite number, from 0 to 1"
    assert Range(0, 1).refusal(1) is None
    assert element_of(list[int]) is int
