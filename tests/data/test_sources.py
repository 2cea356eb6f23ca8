"""Text sources: what they read, how they split, and what they say when they cannot."""

import gzip
import http.server
import json
import threading
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bov_lightning.errors import UserError
from data_modules import reader as reader_module
from data_modules.reader import MixedReader, StripeReader, open_stripe, stripe_of
from data_modules.sources import (
    HubDataset,
    Mixture,
    StandardLibrary,
    TextFiles,
    TextSource,
    Unit,
    Weighted,
    cut_at_lines,
)


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 30))
def test_cutting_loses_nothing_but_white_space(text, max_chars):
    pieces = list(cut_at_lines(text, max_chars))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    for piece in pieces:
        assert len(piece) <= max_chars or piece.count("\n") <= 1


def documents(source: TextSource, split: str = "train", **options) -> list[str]:
    return list(open_stripe(source, split, **options))


def test_standard_library_holds_out_whole_files():
    source = StandardLibrary(max_chars=10**9)
    train, val = set(documents(source)), set(documents(source, "val"))
    assert len(train) > 5 * len(val) > 0
    assert not train & val
    files = set(source.files())
    assert "json/decoder.py" in files
    assert not any(name.startswith(("test/", "site-packages/", "idlelib/")) for name in files)
    assert source.fingerprint() == StandardLibrary(max_chars=10**9).fingerprint()
    assert source.fingerprint() != StandardLibrary(val_one_in=7).fingerprint()


@pytest.fixture
def files(tmp_path):
    table = pyarrow.table({"text": ["one", "", None, "two"], "id": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("three", " ", "four"))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    compressed = pyarrow.compress(lines.encode(), codec="zstd", asbytes=True)
    (tmp_path / "b.jsonl.zst").write_bytes(compressed)
    (tmp_path / "c.txt").write_text("five\nsix")
    return tmp_path


def test_every_format_gives_its_documents_in_order(files):
    names = ["a.parquet", "*.gz", "b.jsonl.zst", "c.txt"]
    source = TextFiles([str(files / name) for name in names], [])
    expected = ["one", "two", "three", "four", "three", "four", "five\nsix"]
    assert documents(source) == expected
    stripe = open_stripe(source, "train")
    assert list(stripe) == expected
    assert (stripe.counts.documents, stripe.counts.empty) == (7, 4)


@given(st.integers(1, 20), st.integers(1, 40))
def test_stripes_share_every_row_out_once(n_unit, n_stripe):
    units = [Unit(str(i)) for i in range(n_unit)]
    taken = [
        (unit.name, row)
        for index in range(n_stripe)
        for unit, share, turn in stripe_of(units, index, n_stripe)
        for row in range(50)
        if row % share == turn
    ]
    assert sorted(taken) == sorted((str(i), row) for i in range(n_unit) for row in range(50))


@pytest.mark.parametrize("n_stripe", [1, 2, 3, 25, 64])
def test_a_reader_continues_after_any_document(synthetic, n_stripe):
    whole = sorted(documents(synthetic))
    parts = [documents(synthetic, index=i, n_stripe=n_stripe) for i in range(n_stripe)]
    assert sorted(text for part in parts for text in part) == whole
    expected = parts[n_stripe // 2]
    for stop in range(0, len(expected) + 1, 1 + len(expected) // 9):
        first = StripeReader(synthetic, "train", n_stripe // 2, n_stripe)
        iterator = iter(first)
        assert [next(iterator) for _ in range(stop)] == expected[:stop]
        second = StripeReader(synthetic, "train", n_stripe // 2, n_stripe)
        second.state = json.loads(json.dumps(first.state))
        assert list(second) == expected[stop:]


def test_mixtures_keep_their_proportions_and_resume(synthetic, files):
    other = TextFiles([str(files / "b.jsonl.gz")], [])
    mixture = Mixture([Weighted(synthetic, 3.0), Weighted(other, 1.0)])
    forever = open_stripe(mixture, "train", forever=True)
    iterator = iter(forever)
    texts = [next(iterator) for _ in range(400)]
    for n in (4, 40, 400):
        assert sum(text in ("three", "four") for text in texts[:n]) == n // 4
    stopped = open_stripe(mixture, "train", forever=True)
    stopped_iterator = iter(stopped)
    assert [next(stopped_iterator) for _ in range(123)] == texts[:123]
    resumed = open_stripe(mixture, "train", forever=True)
    resumed.state = json.loads(json.dumps(stopped.state))
    resumed_iterator = iter(resumed)
    assert [next(resumed_iterator) for _ in range(277)] == texts[123:]

    finite = open_stripe(mixture, "train")
    assert isinstance(finite, MixedReader)
    assert len(list(finite)) == 152
    assert finite.counts.documents == 152


@pytest.mark.slow
def test_a_hub_dataset_reads_like_its_files(synthetic, tmp_path, monkeypatch):
    """A local folder in the hub's layout, through the same streaming code."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "dataset" / "data"
    folder.mkdir(parents=True)
    for split, name in (("train", "train"), ("val", "validation")):
        for i, path in enumerate(synthetic.files(split)):
            (folder / f"{name}-{i:05d}.parquet").write_bytes(Path(path).read_bytes())
    source = HubDataset(str(folder.parent))
    assert len(source.units("train", 1)) == 2
    assert sorted(documents(source)) == sorted(documents(synthetic))
    assert documents(source, "val") == documents(synthetic, "val")
    expected = documents(source, index=1, n_stripe=3)
    reader = StripeReader(source, "train", 1, 3)
    iterator = iter(reader)
    first = [next(iterator) for _ in range(5)]
    again = StripeReader(source, "train", 1, 3)
    again.state = reader.state
    assert first + list(again) == expected
    with pytest.raises(UserError, match="no column 'body'"):
        documents(HubDataset(str(folder.parent), column="body"))
    with pytest.raises(UserError, match="cannot be opened"):
        documents(HubDataset(str(folder.parent), train_split="nothing"))


class FlakyServer(http.server.SimpleHTTPRequestHandler):
    """Fails two of three requests for a file's content."""

    requests = 0
    protocol_version = "HTTP/1.0"

    def do_GET(self):
        FlakyServer.requests += 1
        if FlakyServer.requests % 3:
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(files, monkeypatch):
    monkeypatch.setattr(reader_module, "FIRST_WAIT_S", 0.001)
    FlakyServer.requests = 0
    handler = partial(FlakyServer, directory=str(files))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_transient_errors_of_a_server_are_retried_and_lose_nothing(server):
    assert documents(TextFiles([f"{server}/b.jsonl.gz"], [])) == ["three", "four"]
    assert FlakyServer.requests >= 3


def test_reading_from_a_server_resumes_at_any_document(server, files):
    """As `bov prepare` and streams do after a restart, while two of three requests fail."""
    lines = [json.dumps({"text": f"document {i}"}) for i in range(60)]
    (files / "many.jsonl").write_text("\n".join(lines))
    source = TextFiles([f"{server}/many.jsonl"], [])
    expected = documents(TextFiles([str(files / "many.jsonl")], []), index=1, n_stripe=2)
    state, found = None, []
    for n in (7, 16, 7):
        reader = StripeReader(source, "train", 1, 2)
        if state is not None:
            reader.state = state
        iterator = iter(reader)
        found += [next(iterator) for _ in range(n)]
        state = json.loads(json.dumps(reader.state))
    assert found == expected


def test_lasting_errors_of_a_server_name_the_file(server, monkeypatch):
    monkeypatch.setattr(FlakyServer, "do_GET", lambda self: self.send_error(503))
    with pytest.raises(UserError, match=r"b\.jsonl\.gz cannot be read"):
        documents(TextFiles([f"{server}/b.jsonl.gz"], []))


def test_fingerprint_changes_with_a_file(files):
    def fingerprint():
        return TextFiles([str(files / "c.txt")], [str(files / "a.parquet")]).fingerprint()

    before = fingerprint()
    assert before == fingerprint()
    (files / "c.txt").write_text("five\nsiX")
    assert before != fingerprint()


BAD_LINES = b'{"text": "a"}\n{"tex": "b"}\n[1]\n\xff\xfe\n{"text": 3}\nno json\n{"text": "z"}\n'


def test_bad_rows_are_errors_with_file_and_row_or_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(BAD_LINES)
    with pytest.raises(UserError, match=r"x\.jsonl row 2: no key 'text'; on_error: skip"):
        documents(TextFiles([str(path)], []))
    reader = StripeReader(TextFiles([str(path)], []), "train", on_error="skip")
    assert list(reader) == ["a", "z"]
    assert (reader.counts.documents, reader.counts.skipped) == (2, 5)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("x.parquet", "not parquet", "x.parquet"),
        ("x.csv", "text\n", "no known kind"),
        ("x.jsonl.gz", "no gzip", "x.jsonl.gz cannot be read"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, word, monkeypatch):
    monkeypatch.setattr(reader_module, "FIRST_WAIT_S", 0.001)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=word):
        documents(TextFiles([str(tmp_path / name)], []))


def test_invalid_utf8_missing_columns_and_missing_files_are_named(files):
    (files / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"bad\.txt row 1: invalid UTF-8 at byte 2"):
        documents(TextFiles([str(files / "bad.txt")], []))
    with pytest.raises(UserError, match="no column 'body'.*text, id"):
        documents(TextFiles([str(files / "a.parquet")], [], column="body"))
    with pytest.raises(UserError, match="no file matches"):
        documents(TextFiles([str(files / "*.zip")], []))
    with pytest.raises(UserError, match="row 1: id is no text"):
        documents(TextFiles([str(files / "a.parquet")], [], column="id"))
