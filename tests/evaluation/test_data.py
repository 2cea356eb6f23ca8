"""Task files: intact, or a line that says what is wrong; downloads when asked for."""

import hashlib
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bov_lightning.cli import main
from bov_lightning.errors import UserError
from evaluation.data import VARIABLE, download, read_rows
from evaluation.runner import Benchmarks, load_tasks

ROWS = (
    b'{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query": "d", "choices": [], "gold": 1}\n'
)
NAME = "world/task.jsonl"
SHA = hashlib.sha256(ROWS).hexdigest()


@pytest.fixture(autouse=True)
def no_data_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(folder: Path, content: bytes = ROWS) -> Path:
    path = folder / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("layout", [".", "eval_data", "eval_bundle/eval_data"])
def test_files_are_found_in_every_layout(layout, tmp_path, monkeypatch):
    put(tmp_path / layout)
    assert read_rows(tmp_path, NAME, SHA)[1]["query"] == "d"
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert len(read_rows(None, NAME, SHA)) == 2


@pytest.mark.parametrize("content", [ROWS[:-20], ROWS.replace(b"a", b"x"), b""])
def test_truncated_and_altered_files_are_refused(content, tmp_path):
    put(tmp_path, content)
    with pytest.raises(UserError, match=r"task\.jsonl is truncated or altered"):
        read_rows(tmp_path, NAME, SHA)


def test_missing_files_say_where_to_put_them(tmp_path, capsys):
    with pytest.raises(UserError, match=f"holds no {NAME}: unpack.*--data-dir or {VARIABLE}"):
        read_rows(tmp_path, NAME, SHA)
    put(tmp_path, b"no json\n")
    with pytest.raises(UserError, match="is no JSONL file"):
        read_rows(tmp_path, NAME, None)


def test_offline_without_data_is_one_line(tmp_path, shared, capsys):
    model = str(shared / "parity" / "core")
    assert main(["evaluate", model, "--data-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err.strip()
    assert err.count("\n") == 0
    assert "jeopardy_all.jsonl" in err


class Server(BaseHTTPRequestHandler):
    """Serves one file with ranges; ends the first transfer early when told to."""

    content = b""
    cut_off = False
    requests: list[str | None] = []

    def do_GET(self):
        range_ = self.headers.get("Range")
        type(self).requests.append(range_)
        start = int(range_.removeprefix("bytes=").removesuffix("-")) if range_ else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        body = self.content[start:]
        self.send_response(206 if range_ else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.cut_off:
            type(self).cut_off = False
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    archive = tmp_path / "bundle.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr(f"eval_bundle/eval_data/{NAME}", ROWS)
        bundle.writestr("eval_bundle/eval_data/other.jsonl", b"x" * 100_000)
    Server.content, Server.cut_off, Server.requests = archive.read_bytes(), False, []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("BOV_EVAL_URL", f"http://127.0.0.1:{httpd.server_port}/bundle.zip")
    yield Server
    httpd.shutdown()
    httpd.server_close()


def test_download_fetches_once_and_only_what_is_needed(server, tmp_path):
    target = tmp_path / "data"
    threads = [threading.Thread(target=download, args=(target, {NAME: SHA})) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == [None]
    assert len(read_rows(target, NAME, SHA)) == 2
    assert [p.name for p in target.rglob("*") if p.is_file() and p.name[0] != "."] == ["task.jsonl"]
    assert not list(target.rglob("*.partial"))


def test_interrupted_download_is_continued(server, tmp_path):
    server.cut_off = True
    with pytest.raises(UserError, match="the same command continues"):
        download(tmp_path / "data", {NAME: SHA})
    half = len(server.content) // 2
    download(tmp_path / "data", {NAME: SHA})
    assert server.requests == [None, f"bytes={half}-"]
    assert len(read_rows(tmp_path / "data", NAME, SHA)) == 2


def test_altered_bundles_leave_nothing_behind(server, tmp_path):
    with pytest.raises(UserError, match="has another world/task.jsonl"):
        download(tmp_path / "data", {NAME: "0" * 64})
    assert not list((tmp_path / "data").rglob("*.jsonl"))
    server.content = b"no zip file"
    with pytest.raises(UserError, match="gave no zip file"):
        download(tmp_path / "other", {NAME: SHA})


def test_no_connection_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("BOV_EVAL_URL", "http://127.0.0.1:9/bundle.zip")
    with pytest.raises(UserError, match=r"cannot be downloaded.*put the unpacked eval_bundle into"):
        download(tmp_path, {NAME: SHA})


@pytest.mark.slow
def test_checksums_are_those_of_the_reference_files(shared):
    import yaml

    from evaluation.runner import TASKS

    paths = sorted((TASKS / "core").glob("[!_]*.yaml"))
    assert len(paths) == 21
    for path in paths:
        text = path.read_text().replace("!function", "")
        metadata = yaml.safe_load(text)["metadata"]
        rows = read_rows(shared / "eval_bundle", metadata["file"], metadata["sha256"])
        assert len(rows) == metadata["rows"]
        assert json.dumps(rows[0])


def test_rows_of_a_task_are_the_lines_of_its_file(tmp_path):
    """With separators inside, and a byte order mark in front, as editors leave them."""
    rows = [{"query": "a\u2028b\x85c\x0cd"}, {"query": "\ufeffe\r\n"}]
    text = "\r\n".join([json.dumps(row, ensure_ascii=False) for row in rows] + ["", " "])
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_rows(tmp_path, "x.jsonl", None) == rows


def test_a_task_without_rows_is_refused(tmp_path):
    put(tmp_path, b"\n")
    (tmp_path / "empty.yaml").write_text(
        "task: empty\nclass: !function evaluation.scorer.CoreTask\nnum_fewshot: 0\nmetadata:\n"
        "  kind: multiple_choice\n  delimiter: ' '\n  baseline: {v1: 0.5, v2: 0.5}\n"
        f"  file: {NAME}\n"
    )
    with pytest.raises(UserError, match=f"empty: {NAME} has no rows to score"):
        load_tasks(Benchmarks(("empty",), None, str(tmp_path), str(tmp_path)))
