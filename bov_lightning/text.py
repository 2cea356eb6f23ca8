"""What text is, said once: which bytes are text, what a line is, what is printed of it."""

import codecs
import io
import sys
from collections.abc import Iterator

FAILING = ("strict", "surrogateescape", "surrogatepass")
"""What an output may do with characters that its character set lacks, and that raises."""


class NoTextError(ValueError):
    """Bytes or a string that are no text; says why."""


def decode(data: bytes) -> str:
    """The text that UTF-8 bytes are, without the byte order mark that some editors put in front.

    Raises:
        NoTextError: where they stop being UTF-8, and what they may be instead.
    """
    mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
    try:
        return data[len(mark) :].decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 at byte {len(mark) + error.start}"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        reason += ", since it is UTF-16, which has to be converted to UTF-8"
    elif data.startswith(b"\x1f\x8b"):
        reason += ", since it is compressed with gzip"
    raise NoTextError(reason)


def check(text: str) -> str:
    r"""The text itself, if its characters are whole.

    JSON can write half of a character (``"\ud83d"``), and Python reads bytes of file names and of
    command lines that are not UTF-8 as such halves.

    Raises:
        NoTextError: one of them is half a character.
    """
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise NoTextError(f"half a character ({half}) at character {error.start}") from None
    return text


def lines(text: str, keep_ends: bool = False) -> Iterator[str]:
    r"""The lines of a text: "\n" ends one, or "\r\n", and nothing else does.

    `str.splitlines` also ends them at form feeds, U+0085, U+2028 and the like, which stand inside
    of JSON strings, of source files and of what people write.
    """
    for line in io.StringIO(text, newline="\n"):
        if keep_ends:
            yield line
        else:
            yield line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")


def print_any_text() -> None:
    """From here on a character that an output's character set lacks is printed as a question mark.

    Without it, a sampled character ends a command where the locale is not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in FAILING:
            stream.reconfigure(errors="replace")
