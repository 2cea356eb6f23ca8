"""Text as people have it: what is a line, what bytes are text, what an output can show."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hypothesis import example, given
from hypothesis import strategies as st
from test_structure import PACKAGES

from bov_lightning.cli import main
from bov_lightning.console import CONSOLE, say
from bov_lightning.text import NoTextError, check, decode, lines, print_any_text

SEPARATORS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"
"""What `str.splitlines` ends a line at, beside line ends."""

texts = st.text(alphabet="ab\r\n" + SEPARATORS)


@given(texts)
@example("\r\n\n\r")
def test_a_line_ends_at_a_newline_and_nowhere_else(text):
    whole = list(lines(text, keep_ends=True))
    assert "".join(whole) == text
    assert all(line.endswith("\n") for line in whole[:-1])
    assert [line.count("\n") for line in whole] in ([1] * len(whole), [1] * (len(whole) - 1) + [0])
    # As binary files do it.
    assert [line.encode() for line in whole] == list(io.BytesIO(text.encode()))
    ends = [line.removesuffix("\n") for line in whole]
    stripped = [e.removesuffix("\r") if w != e else e for e, w in zip(ends, whole, strict=True)]
    assert list(lines(text)) == stripped


@given(st.text(alphabet="ab \n"))
def test_ordinary_lines_are_those_that_everybody_means(text):
    assert list(lines(text)) == text.splitlines()
    assert list(lines(text, keep_ends=True)) == text.splitlines(keepends=True)


def test_nothing_else_in_the_project_decides_what_a_line_is():
    """`str.splitlines` ends lines at more than line ends."""
    found = [
        f"{path}:{node.lineno}"
        for package in (*PACKAGES, "docs", "benchmarks", "examples")
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        if "splitlines" in (text := path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and node.attr == "splitlines"
    ]
    assert not found


@given(st.text())
def test_a_byte_order_mark_in_front_does_not_count(text):
    data = text.encode()
    assert decode(b"\xef\xbb\xbf" + data) == text
    assert decode(data) == text.removeprefix("\ufeff")
    assert decode(b"x" + b"\xef\xbb\xbf" + data) == f"x\ufeff{text}"


@given(st.binary())
def test_bytes_are_text_or_it_is_said_where_they_are_not(data):
    try:
        assert decode(data).encode() == data.removeprefix(b"\xef\xbb\xbf")
    except NoTextError as error:
        at = int(str(error).partition("at byte ")[2].partition(",")[0])
        data[:at].decode()
        with pytest.raises(UnicodeDecodeError):
            data[: at + 4].decode()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named_where_their_mark_tells(encoding):
    mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
    with pytest.raises(NoTextError, match="UTF-16, which has to be converted"):
        decode(f"{mark}é text".encode(encoding).removeprefix(b"\0\0"))


@given(st.text(st.characters(exclude_categories=()), max_size=20))
def test_text_can_be_encoded(text):
    try:
        assert check(text) is text
        text.encode()
    except NoTextError as error:
        at = int(str(error).rpartition(" ")[2])
        assert 0xD800 <= ord(text[at]) < 0xE000
        text[:at].encode()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "surrogatepass", "replace",
                                    "backslashreplace", "ignore"])  # fmt: skip
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_text_can_be_printed(encoding, errors, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding, errors))
    print_any_text()
    print("plain → \U0001f600 \ud83d end", flush=True)
    shown = printed.getvalue().decode(encoding)
    assert shown.startswith("plain ")
    assert shown.endswith(" end\n")
    # What was asked for by PYTHONIOENCODING stays, where it does not raise.
    kept = errors in ("backslashreplace", "ignore")
    assert sys.stdout.errors == (errors if kept else "replace")


@pytest.mark.parametrize("arguments", [["generate", "run", "--prompt", "caf\udce9"],
                                       ["caf\udce9"], ["fit", "--run.name", "\ud83d"],
                                       ["report", "\udcff"]])  # fmt: skip
def test_arguments_that_are_no_text_are_refused(arguments, capsys, workplace):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.rstrip("\n").split("\n")
    assert line.startswith("bov: error: the argument ")
    assert "is not valid UTF-8" in line
    assert not list(Path().iterdir())


@pytest.mark.parametrize("locale", ["C.UTF-8", "C", "POSIX"])
def test_bytes_of_a_shell_that_are_no_utf8_are_refused(locale, workplace):
    """The real thing: what Python makes of the bytes depends on the locale."""
    command = [sys.executable, "-m", "bov_lightning.cli", "generate", "x", "--prompt", b"caf\xe9"]
    environment = {**os.environ, "LC_ALL": locale, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == b"bov: error: the argument 'caf\\udce9' is not valid UTF-8: give it as" \
                          b" UTF-8, or in a file\n"  # fmt: skip


@pytest.mark.parametrize("text", ["runs/exp[v2]", "[bold]x[/bold]", "[/nothing]", ":smile: \\["])
def test_what_is_said_is_printed_as_it_is(text, capsys):
    """Names of folders are no markup."""
    say(text)
    CONSOLE.print(text)
    assert capsys.readouterr().err == f"{text}\n" * 2


def test_a_working_folder_that_is_no_text_is_refused(workplace, capsys, monkeypatch):
    """Recipes, checkpoints and the libraries below write its name as text."""
    folder = os.fsencode(workplace) + b"/caf\xe9"
    os.mkdir(folder)
    monkeypatch.chdir(folder)
    assert main(["plan", "--config", "quickstart"]) == 2
    assert "'\n" not in (error := capsys.readouterr().err)
    assert error.startswith("bov: error: the working folder ")
    assert error.endswith("caf\\udce9' has a name that is not valid UTF-8: rename it\n")
