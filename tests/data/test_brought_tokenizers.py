"""Tokenizers that somebody brings: one decision on what they mean, and every byte is counted."""

import copy
import json
from functools import cache

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import CHANGING, LIMITED, LINES, WHOLE, bring, byte_fallback, byte_level
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import bov_lightning
from bov_lightning.checkpoint.directory import find_checkpoint
from bov_lightning.cli import main
from bov_lightning.errors import UserError
from data_modules.tokenizer import (
    TokenizerConfig,
    bos_id,
    decide,
    encode_documents,
    identity,
    read_tokenizer,
    same_tokenizer,
    save_tokenizer,
    token_bytes,
    tokenizer_hash,
    transformers_tokenizer,
    vocabulary_size,
)

pytestmark = pytest.mark.slow

KINDS = {**WHOLE, **LIMITED}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The decision on a tokenizer of some kind, and its bytes."""
    folder = tmp_path_factory.mktemp("kinds")

    @cache
    def read(kind: str):
        decision = decide(bring(folder / kind, KINDS[kind]()), "<s>" if kind == "spelled" else None)
        return decision, decision.tokenizer(), token_bytes(decision.tokenizer())

    return read


def check_text(read, kind: str, text: str) -> None:
    _, tokenizer, n_byte = read(kind)
    ids = next(encode_documents(tokenizer, [text]))
    assert ids[0] == bos_id(tokenizer)
    assert n_byte[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids[1:].tolist(), skip_special_tokens=False) == text
    assert (ids[1:] != ids[0]).all()


SPELLED = ["<s>", "<|endoftext|>", "<unk>", "<0x41>", " ", "  ", "\n", "café", "cafe\u0301", "ﬁ"]
TEXT = st.lists(st.text(max_size=8) | st.sampled_from(SPELLED), max_size=8).map("".join)


@pytest.mark.parametrize("kind", WHOLE)
@settings(deadline=None, max_examples=60)
@given(text=TEXT)
def test_bytes_of_the_tokens_are_those_of_any_text(read, kind, text):
    # Where ▁ stands for a space, the two cannot be told apart.
    check_text(read, kind, text.replace("▁", "_"))


KNOWN = sorted(set("".join(LINES)))


@pytest.mark.parametrize("kind", LIMITED)
@settings(deadline=None, max_examples=60)
@given(text=st.text(alphabet=KNOWN, max_size=40))
def test_bytes_of_the_tokens_are_those_of_a_text_that_a_small_vocabulary_can_write(
    read, kind, text
):
    check_text(read, kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_means_the_same(read, kind, tmp_path):
    decision, tokenizer, _ = read(kind)
    save_tokenizer(tokenizer, tmp_path, decision.names)
    again = decide(tmp_path)
    assert (again.content, again.names, again.left_out) == (decision.content, decision.names, ())
    stored = transformers_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert stored.bos_token_id == theirs.bos_token_id == bos_id(tokenizer)
    assert len(theirs) == len(stored) == tokenizer.get_vocab_size()
    text = "".join(LINES[:2])
    (ids,) = encode_documents(tokenizer, [text])
    for other in (stored, theirs):
        assert other(text).input_ids == ids[1:].tolist()
        assert other.decode(ids[1:].tolist()) == text
    save_tokenizer(again.tokenizer(), tmp_path / "twice", again.names)
    assert same_tokenizer(tmp_path, tmp_path / "twice")
    assert tokenizer_hash(tmp_path) == tokenizer_hash(tmp_path / "twice")


@pytest.mark.parametrize("kind", CHANGING)
def test_what_changes_texts_is_refused(kind, tmp_path):
    with pytest.raises(UserError, match="cannot be pretrained with"):
        read_tokenizer(bring(tmp_path, CHANGING[kind](), bos_token="<s>"), _any_start(kind))


def _any_start(kind: str) -> str | None:
    return None if kind in ("word_pieces", "words") else "<|endoftext|>"


def test_size_is_the_highest_id_and_one(read):
    _, tokenizer, n_byte = read("byte_level_holes")
    ids = set(tokenizer.get_vocab().values())
    assert vocabulary_size(tokenizer) == len(n_byte) == max(ids) + 1 > len(ids)
    assert all(n_byte[i] == 0 for i in range(len(n_byte)) if i not in ids)


@pytest.mark.parametrize("start", ["<s>", "<bos>", "[BOS]", "<|endoftext|>", "<|begin_of_text|>",
                                   "<|bos|>"])  # fmt: skip
def test_usual_names_start_documents(start, tmp_path):
    assert decide(bring(tmp_path, byte_level(start))).start == start


def test_who_names_the_start_of_documents(tmp_path):
    """The user, then tokenizer_config.json, then special_tokens_map.json, then the usual names."""
    tokenizer = byte_level("<s>")
    tokenizer.add_special_tokens(["<a>", "<b>", "<c:d e>", "</s>"])
    folder = bring(tmp_path / "own", tokenizer)
    assert decide(folder).start == "<s>"
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<b>"}}))
    assert decide(folder).start == "<b>"
    bring(folder, tokenizer, bos_token={"content": "<a>"}, eos_token="</s>", pad_token="<none>")
    assert decide(folder).start == "<a>"
    found = decide(folder, "<c:d e>")
    assert found.names == {"bos_token": "<c:d e>", "eos_token": "</s>"}
    assert bos_id(found.tokenizer()) == tokenizer.token_to_id("<c:d e>")
    # Only what does not follow from the file is part of a corpus's settings.
    config = TokenizerConfig(path=str(folder), start="<s>")
    assert identity(config) == {"hash": tokenizer_hash(folder)}
    config = TokenizerConfig(path=str(folder))
    assert identity(config) == {"hash": tokenizer_hash(folder), "start": "<a>"}
    # What this package once wrote for every tokenizer.
    assert decide(bring(folder, tokenizer, bos_token="<|bos|>")).start == "<s>"


@pytest.mark.parametrize(
    ("start", "named", "words"),
    [
        (None, {}, ["names no token that starts", "tokenizer.start", "<other>"]),
        (None, {"bos_token": "<s>"}, ["'<s>'", "does not have", "tokenizer.start"]),
        ("<s>", {}, ["tokenizer.start is '<s>'", "does not have"]),
        ("a", {}, ["'a a b' becomes a special token"]),
    ],
)
def test_a_tokenizer_that_starts_no_document_is_refused(start, named, words, tmp_path):
    folder = bring(tmp_path, byte_level("<other>"), **named)
    with pytest.raises(UserError) as caught:
        read_tokenizer(folder, start)
    for word in words:
        assert word in str(caught.value)
    assert bos_id(read_tokenizer(folder, "<other>")) == 0


def test_a_start_without_a_path_is_refused():
    with pytest.raises(UserError, match=r"tokenizer\.start"):
        TokenizerConfig(start="<s>")


def test_broken_settings_are_refused(tmp_path):
    folder = bring(tmp_path, byte_level())
    for text in ("{", "[]"):
        (folder / "tokenizer_config.json").write_text(text)
        with pytest.raises(UserError, match=r"tokenizer_config\.json cannot be read"):
            decide(folder)


def recipe(settings: dict, folder, size: int, text: list[str]) -> None:
    """recipe.yaml, which trains with a brought tokenizer on text of its own."""
    for split in ("train", "val"):
        with open(f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": line}) + "\n" for line in text)
    source = {"train": ["train.jsonl"], "val": ["val.jsonl"]}
    data = {
        "class_path": "data_modules.PackedDataModule",
        "init_args": {
            "directory": "packed", "n_shard": 1, "tokenizer": {"path": str(folder)},
            "source": {"class_path": "data_modules.TextFiles", "init_args": source},
        },
    }  # fmt: skip
    config = {**settings["model"]["config"], "vocab_size": size}
    changed = {**settings, "model": {**settings["model"], "config": config}, "data": data}
    with open("recipe.yaml", "w") as file:
        yaml.safe_dump(changed, file, sort_keys=False)


def test_a_val_text_that_cannot_be_written_is_refused(tiny_settings, workplace, capsys):
    folder = bring(workplace / "brought", LIMITED["metaspace"]())
    size = vocabulary_size(read_tokenizer(folder))
    recipe(tiny_settings, folder, size, [*LINES, "a smile: 🙂"])
    command = ["prepare", "--config", "recipe.yaml", "--processes", "1"]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "val documents" in error
    assert "🙂" in error
    assert not list((workplace / "packed").glob("*.bin"))
    recipe(tiny_settings, folder, size, LINES)
    assert main([*command, "--data.init_args.directory", "again"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "byte_fallback"])
def test_every_command_starts_documents_alike(kind, tiny_settings, workplace, capsys):
    tokenizer = KINDS[kind]()
    own_end = kind == "byte_fallback"
    named = {"bos_token": "<s>", "eos_token": "</s>"} if own_end else {}
    folder = bring(workplace / "brought", tokenizer, **named)
    decision = decide(folder)
    tokenizer, start = decision.tokenizer(), bos_id(decision.tokenizer())
    text = [" then\n".join(LINES[i : i + 4]) for i in range(len(LINES) - 3)]
    changed = copy.deepcopy(tiny_settings)
    changed["model"]["config"]["sequence_len"] = 128
    changed["batch"]["micro"] = 2
    changed["evaluation"] = {"tasks": ["heldout"], "max_per_task": 8}
    recipe(changed, folder, vocabulary_size(tokenizer), text)
    assert main(["fit", "--config", "recipe.yaml"]) == 0
    rows = np.fromfile("packed/val-00000-of-00001.bin", dtype=np.uint16).reshape(-1, 129)
    assert (rows[:, 0] == start).all()
    assert main(["validate", "runs/tiny"]) == 0
    assert main(["evaluate", "runs/tiny", "--tasks", "heldout", "--max-per-task", "8"]) == 0
    for command in (["export", "runs/tiny", "--output", "export"],
                    ["import", "hf", "export", "--output", "import"]):  # fmt: skip
        assert main(command) == 0
    heldout = (workplace / "runs/tiny/eval/heldout/continuation.jsonl").read_text()
    queries = "".join(json.loads(line)["query"] for line in heldout.split("\n") if line)
    assert set(queries) <= set("".join(text))
    for path in ("runs/tiny", "export", "import"):
        found = bov_lightning.load(path)[1]
        assert found.bos_token_id == start
        assert found.encode(text[0], add_special_tokens=False) == (
            tokenizer.encode(text[0], add_special_tokens=False).ids
        )
        if named or path != "runs/tiny":
            assert found.eos_token == named.get("eos_token", decision.start)
        capsys.readouterr()
        options = ["--prompt", "once upon", "--temperature", "0", "--max-new-tokens", "5"]
        assert main(["generate", path, *options]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("once upon")
    exported = AutoTokenizer.from_pretrained("export", trust_remote_code=True)
    assert exported(text[0]).input_ids[0] == start
    ends = json.loads((workplace / "export/generation_config.json").read_text())["eos_token_id"]
    assert start in (ends if isinstance(ends, list) else [ends])
    checkpoint = find_checkpoint("runs/tiny")
    assert same_tokenizer(checkpoint / "tokenizer", "packed/tokenizer")


def test_what_a_file_adds_by_itself_is_not_doubled(tmp_path):
    """Neither BOS nor a space comes twice."""
    tokenizer = byte_fallback()
    start = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[start])
    folder = bring(tmp_path / "own", tokenizer, bos_token="<s>", add_bos_token=True)
    found = read_tokenizer(folder)
    assert found.encode("once").ids == found.encode("once", add_special_tokens=False).ids
    for text in ("once upon", " once", ""):
        (ids,) = encode_documents(found, [text])
        assert list(ids).count(bos_id(found)) == 1
        assert found.decode(ids[1:].tolist()) == text
