"""Text files as people have them: names, patterns, encodings, separators, columns."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data.conftest import make_corpus, numbered, write_parquet
from hypothesis import example, given
from hypothesis import strategies as st

from bov_lightning.errors import UserError
from data_modules import reader as reader_module
from data_modules.files import find_files
from data_modules.packing import PackingConfig
from data_modules.reader import StripeReader
from data_modules.sources import HubDataset, Mixture, TextFiles, Weighted

BOM = b"\xef\xbb\xbf"


def read(*patterns: str | Path, on_error="error", column="text") -> list[str]:
    source = TextFiles([str(pattern) for pattern in patterns], [], column)
    return list(StripeReader(source, "train", on_error=on_error))


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": t}, ensure_ascii=False).encode() + b"\n" for t in texts)


def write_zst(path: Path, data: bytes) -> None:
    path.write_bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


WRITERS = {
    ".jsonl": Path.write_bytes,
    ".jsonl.gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    ".jsonl.zst": write_zst,
}

documents = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: not t.isspace()),
    max_size=5,
)


@pytest.mark.parametrize("kind", WRITERS)
@given(texts=documents, mark=st.booleans(), end=st.sampled_from([b"\n", b"\r\n", b"\n\r\n \n"]))
@example(["a\u2028b\x85c\x0cd\x1ee\0", "\ufeffx"], True, b"\r\n")
def test_a_line_of_jsonl_is_a_document_whatever_it_holds(tmp_path_factory, kind, texts, mark, end):
    path = tmp_path_factory.mktemp("lines") / f"x{kind}"
    data = (BOM if mark else b"") + jsonl(*texts).replace(b"\n", end)
    WRITERS[kind](path, data)
    assert read(path) == texts


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")))
@example("a\r\nb\x0c\x85\u2028c\rd\n")
def test_a_text_file_is_trained_on_as_it_is(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("whole") / "x.txt"
    for mark in (b"", BOM):
        path.write_bytes(mark + text.encode())
        assert read(path) == ([text] if text.strip() else [])


BAD = {
    "half a character": (b'{"text": "a broken emoji \\ud83d"}', "half a character"),
    "the other half": (b'{"text": "\\ude00"}', "half a character"),
    "a number": (b'{"text": 5}', "text is no text but int"),
    "an object": (b'{"text": {"en": "x"}}', "text is no text but dict"),
    "a list": (b'{"text": ["x"]}', "text is no text but list"),
    "true": (b'{"text": true}', "text is no text but bool"),
    "no object": (b'["text"]', "no JSON object"),
    "half a line": (b'{"text": "still being wri', "no JSON object"),
    "a deep one": (b"[" * 100_000, "no JSON object"),
    "a long number": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "no JSON object"),
    "NUL": (b'{"text": "a\0"}', "no JSON object"),
    "Latin-1": (b'{"text": "caf\xe9"}', "invalid UTF-8 at byte 13"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_or_left_out_and_counted(tmp_path, kind):
    line, reason = BAD[kind]
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl("first") + line + b"\n" + jsonl("last"))
    with pytest.raises(UserError, match=rf"x\.jsonl row 2: {reason}.*on_error: skip"):
        read(path)
    reader = StripeReader(TextFiles([str(path)], []), "train", on_error="skip")
    assert list(reader) == ["first", "last"]
    assert (reader.counts.documents, reader.counts.skipped) == (2, 1)


def invalid_strings() -> pyarrow.Array:
    """Strings of which parquet does not check that they are UTF-8."""
    return pyarrow.array([b"one", b"caf\xe9", None, b"\xed\xa0\xbd", b"two"]).view(pyarrow.string())


COLUMNS = {
    "string": pyarrow.array(["one", None, "two"]),
    "large_string": pyarrow.array(["one", None, "two"], pyarrow.large_string()),
    "dictionary": pyarrow.array(["one", None, "two", "one"]).dictionary_encode(),
    "binary": pyarrow.array([b"one", None, BOM + b"two"]),
    "large_binary": pyarrow.array([b"one", b"tw\xff", b"two"], pyarrow.large_binary()),
    "invalid": invalid_strings(),
    "invalid dictionary": invalid_strings().dictionary_encode(),
    "number": pyarrow.array([1, 2]),
    "struct": pyarrow.array([{"en": "x"}]),
    "list": pyarrow.array([["x"]]),
}
READ = dict.fromkeys(COLUMNS, (["one", "two"], 0)) | {
    "dictionary": (["one", "two", "one"], 0), "large_binary": (["one", "two"], 1),
    "invalid": (["one", "two"], 2), "invalid dictionary": (["one", "two"], 2),
    "number": ([], 2), "struct": ([], 1), "list": ([], 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_parquet_are_text_or_said_to_be_none(tmp_path, kind):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": COLUMNS[kind]}), path)
    texts, n_bad = READ[kind]
    reader = StripeReader(TextFiles([str(path)], []), "train", on_error="skip")
    assert list(reader) == texts
    assert reader.counts.skipped == n_bad
    if n_bad:
        with pytest.raises(
            UserError, match=r"x\.parquet row \d: (text is no text but|invalid UTF-8)"
        ):
            read(path)


REFUSED = {
    "x.json": (b"{}", "no known kind.*is .jsonl"),
    "x.CSV": (b"text\n", "no known kind.*a table"),
    "x.txt.gz": (gzip.compress(b"x"), "no known kind.*unpack"),
    "x": (b"x", "no known kind"),
    "x.jsonl.gz": (b'{"text": "x"}\n', "cannot be read: .*not compressed"),
    "y.jsonl": (gzip.compress(b"{}"), r"cannot be read: .*compressed as \.gz"),
    "y.jsonl.zst": (gzip.compress(b"{}"), r"cannot be read: .*compressed as \.gz"),
    "z.jsonl.gz": (gzip.compress(b'{"text": "x"}\n' * 99)[:-9], "cannot be read"),
    "z.jsonl.zst": (b"\x28\xb5\x2f\xfd and nothing else", "cannot be read"),
    "x.txt": ("text".encode("utf-16"), "row 1: invalid UTF-8 at byte 0, since it is UTF-16"),
    "y.txt": ("text".encode("utf-16-le"), "row 1: NUL bytes"),
    "z.txt": (gzip.compress(b"x"), "row 1: invalid UTF-8 .*gzip"),
    "z.jsonl": ('{"text": "x"}\n'.encode("utf-16"), "row 1: invalid UTF-8 .*UTF-16"),
    "x.parquet": (b"PAR1, half of it", "no parquet file"),
    "y.parquet": (b"", "no parquet file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_at_once(tmp_path, monkeypatch, name):
    """A local file that is cut off or of another kind stays so: nobody waits for it."""
    monkeypatch.setattr(reader_module.time, "sleep", lambda seconds: pytest.fail("waits"))
    content, reason = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read(tmp_path / name)


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "dead.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, reason in (
        ("folder.parquet", "is a folder"), (".", "is a folder"), ("*.parquet", "is a folder"),
        ("dead.jsonl", "is a link to"), ("*.jsonl", "is a link to"), ("pipe.jsonl", "no regular"),
        ("none.jsonl", "no file matches"), ("none*", "no file matches"),
        ("dead.jsonl/x.txt", "no file matches"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            read(tmp_path / name)


names = st.text(st.characters(categories=["L", "N", "P", "S"], exclude_characters="/\0"),
                min_size=1, max_size=8).filter(lambda name: name.strip(".~"))  # fmt: skip


@given(folder=names, name=names)
@example("exp[v2]", "a[1]")
@example("*", "?")
@example("exp[!v2", "we ird#%?&::x{a,b}")
def test_only_the_users_own_pattern_is_a_pattern(tmp_path_factory, folder, name):
    """Names mean themselves, of the working folder as of the file, and patterns see them all."""
    place = tmp_path_factory.mktemp("names") / folder
    (place / "corpus").mkdir(parents=True)
    (tmp_path_factory.getbasetemp() / "other.jsonl").write_bytes(jsonl("other"))
    path = place / "corpus" / f"{name}.jsonl"
    path.write_bytes(jsonl(name))
    before = Path.cwd()
    os.chdir(place)
    try:
        for pattern in (
            f"corpus/{name}.jsonl", "corpus/*.jsonl", "*/*.jsonl", "**/*.jsonl", "./corpus/*",
            "corp[tu]s/*.jsonl", str(path), f"{place}/corpus/*.jsonl", f"file://{path}",
        ):  # fmt: skip
            assert find_files(pattern) == [str(path)]
            assert read(pattern) == [name]
    finally:
        os.chdir(before)


def test_names_may_end_in_capitals_and_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "A.JSONL").write_bytes(jsonl("one"))
    (tmp_path / "B.Jsonl.GZ").write_bytes(gzip.compress(jsonl("two")))
    (tmp_path / "C.TXT").write_bytes(b"three")
    write_parquet(tmp_path / "D.PARQUET", ["four"])
    assert read("~/*") == ["one", "two", "three", "four"]
    assert read("~/C.TXT") == ["three"]


def test_a_name_that_is_no_utf8_is_read(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("text")
    source = TextFiles([str(tmp_path / "*.txt")], [str(tmp_path / "*.txt")])
    assert list(StripeReader(source, "train")) == ["text"]
    assert source.fingerprint() == source.fingerprint()


def test_a_file_is_read_once_whoever_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "cab":
        Path(f"{name}.jsonl").write_bytes(jsonl(name))
    Path("d.jsonl").symlink_to("a.jsonl")
    assert read("b.jsonl", "*.jsonl", tmp_path / "c.jsonl", "./a.jsonl") == ["b", "a", "c"]
    assert read("*.jsonl") == ["a", "b", "c"]
    once = TextFiles(["*.jsonl"], ["b.jsonl"])
    twice = TextFiles(["*.jsonl", "?.jsonl"], ["b.jsonl", "b.jsonl"])
    assert once.fingerprint() == twice.fingerprint()


@pytest.fixture
def said(capsys):
    """The lines that were said about text that is read for both."""

    def said() -> list[str]:
        captured = capsys.readouterr().err.split("\n")
        return [line for line in captured if "for validation and for training" in line]

    return said


@pytest.mark.slow
def test_validation_text_among_the_training_text_is_said_in_one_line(tmp_path, said):
    train, val = (
        write_parquet(tmp_path / f"{name}.parquet", numbered(1000 * i, 150))
        for i, name in enumerate(("train", "val"))
    )
    (tmp_path / "link.parquet").symlink_to("val.parquet")
    every, link = str(tmp_path / "*[ln].parquet"), str(tmp_path / "link.parquet")
    apart = TextFiles([train], [val])
    for source, shared in (
        (apart, None),
        (TextFiles([every], [val]), "val.parquet"),
        (TextFiles([train, link], [val]), "val.parquet"),
        (TextFiles([every], [train, val]), r"train.parquet (and 1 more)"),
        (Mixture([Weighted(apart), Weighted(TextFiles([val], [train]))]), "(and 1 more)"),
    ):  # fmt: skip
        directory = tmp_path / f"packed-{len(list(tmp_path.iterdir()))}"
        for _ in range(2):
            make_corpus(directory, source, n_shard=1).prepare(processes=1)
            lines = said()
            assert len(lines) == (shared is not None)
            assert all(shared in line for line in lines)


def test_a_split_of_the_hub_for_both_is_seen():
    def shared(**splits) -> bool:
        source = HubDataset("somebody/something", **splits)
        return bool(source.origins("train").keys() & source.origins("val").keys())

    assert shared(val_split="train")
    assert not shared()


def test_a_long_file_is_one_document_and_it_is_said_what_helps(tmp_path, capsys):
    """Following the advice trains on all of it."""
    (tmp_path / "long.txt").write_text(" ".join(f"w{i}x" for i in range(3000)))
    source = TextFiles([str(tmp_path / "long.txt")], [str(tmp_path / "long.txt")])
    make_corpus(tmp_path / "fit", source, n_shard=1).prepare(processes=1)
    captured = capsys.readouterr().err
    assert "1 train rows" in captured
    assert "packing.kind: concat" in captured
    concat = make_corpus(
        tmp_path / "concat", source, n_shard=1, packing=PackingConfig(kind="concat")
    )
    concat.prepare(processes=1)
    captured = capsys.readouterr().err
    assert "0.0% of their tokens cropped" in captured
    assert "packing.kind" not in captured
    short = TextFiles([write_parquet(tmp_path / "s.parquet", numbered(0, 150))] * 2, [])
    short.patterns["val"] = short.patterns["train"]
    make_corpus(tmp_path / "short", short, n_shard=1).prepare(processes=1)
    assert "packing.kind" not in capsys.readouterr().err


def test_text_that_changes_while_it_is_packed_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "growing.jsonl"
    path.write_bytes(jsonl(*numbered(0, 150)))
    corpus = make_corpus(tmp_path / "packed", TextFiles([str(path)], [str(path)]), n_shard=1)
    pack = corpus._pack

    def pack_and_grow(*arguments) -> None:
        pack(*arguments)
        path.write_bytes(path.read_bytes() + jsonl("one more"))

    monkeypatch.setattr(corpus, "_pack", pack_and_grow)
    with pytest.raises(UserError, match="the text changed while it was packed: delete .*packed"):
        corpus.prepare(processes=1)
    assert not corpus.is_prepared()
