"""Text sources: what they read, how they split, and what they say when they cannot."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bov_lightning.errors import UserError
from data_modules.sources import StandardLibrary, TextFiles, cut_at_lines


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 30))
def test_cutting_loses_nothing_but_white_space(text, max_chars):
    pieces = list(cut_at_lines(text, max_chars))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    for piece in pieces:
        assert len(piece) <= max_chars or piece.count("\n") <= 1


def test_standard_library_holds_out_whole_files():
    source = StandardLibrary(max_chars=10**9)
    train, val = set(source.documents("train")), set(source.documents("val"))
    assert len(train) > 5 * len(val) > 0
    assert not train & val
    files = set(source._files())
    assert "json/decoder.py" in files
    assert not any(name.startswith(("test/", "site-packages/", "idlelib/")) for name in files)
    assert source.fingerprint() == StandardLibrary(max_chars=10**9).fingerprint()
    assert source.fingerprint() != StandardLibrary(val_one_in=7).fingerprint()


@pytest.fixture
def files(tmp_path):
    table = pyarrow.table({"text": ["one", "", None, "two"], "id": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in ("three", " ", "four"))
    (tmp_path / "c.txt").write_text("five\nsix")
    return tmp_path


def test_every_format_gives_its_documents_in_order(files):
    source = TextFiles([str(files / name) for name in ("a.parquet", "*.gz", "c.txt")], [])
    assert list(source.documents("train")) == ["one", "two", "three", "four", "five\nsix"]


def test_fingerprint_changes_with_a_file(files):
    def fingerprint():
        return TextFiles([str(files / "c.txt")], [str(files / "a.parquet")]).fingerprint()

    before = fingerprint()
    assert before == fingerprint()
    (files / "c.txt").write_text("five\nsix\nseven")
    assert before != fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("x.jsonl", '{"text": "a"}\n{"tex": "b"}\n', "line 2"),
        ("x.jsonl", "not json\n", "line 1"),
        ("x.parquet", "not parquet", "x.parquet cannot be read"),
        ("x.csv", "text\n", "no known kind"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, word):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=word):
        list(TextFiles([str(tmp_path / name)], []).documents("train"))


def test_invalid_utf8_missing_columns_and_missing_files_are_named(files):
    (files / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"bad\.txt cannot be read"):
        list(TextFiles([str(files / "bad.txt")], []).documents("train"))
    with pytest.raises(UserError, match="no column 'body'.*text, id"):
        list(TextFiles([str(files / "a.parquet")], [], column="body").documents("train"))
    with pytest.raises(UserError, match="no file matches"):
        list(TextFiles([str(files / "*.zip")], []).documents("train"))
