"""What reaches a terminal: text without the control characters that data, names and other people's files may hold.

An ESC sequence in a row's key could set the terminal's title or clipboard, and a bidirectional override could show a
name as another one. Everything that `afterok` prints goes through `clean_streams`, or through
`launchers.observe.show.console`, which writes the escape sequences of its own colours around cleaned text.
"""

import contextlib
import io
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

# C0 but for tab and newline, DEL, C1, and the bidirectional embeddings, overrides and isolates (Unicode Annex 9).
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Return `text` without control characters; tabs and newlines stay."""
    return CONTROL.sub("", text)


def clean_log(text: str) -> str:
    """Return `text` of a log: what a progress bar drew over itself stands line by line."""
    return clean(re.sub(r"\r+\n?", "\n", text))


def count_of(count: int, word: str) -> str:
    """Return `1 curve`, `30 curves`: a count with its word, which takes an s."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def set_in(text: str) -> str:
    """Return `text` whose further lines are set in, so that none of what it quotes looks like a line of ours."""
    return text.replace("\n", "\n  ")


def as_typed(path: Path) -> str:
    """Return a path as the user would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, FileNotFoundError):  # another folder; or this one was deleted
        return str(path)


def size_text(size: float) -> str:
    """Return a number of bytes for people, such as "812 bytes", "3.4 MiB" or "1,024.0 TiB": the unit is by its size."""
    units = ("KiB", "MiB", "GiB", "TiB")
    if size < 1024:
        return f"{size:,.0f} byte{'' if size == 1 else 's'}"
    for unit in units:
        size /= 1024
        if size < 1023.95 or unit == units[-1]:  # what would be printed as 1,024.0 is 1.0 of the next one
            break
    return f"{size:,.1f} {unit}"


def as_float(value: float) -> float:
    """Return a number that JSON gave as a float; infinity for an integer beyond it, since JSON's have no bound."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def json_text(value: Any) -> str:
    """Return `value` as JSON for people: other scripts as they are, control characters escaped as JSON escapes them."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class CleanStream(io.TextIOBase):
    """Represents a text stream whose writes are cleaned; all else is the stream's below."""

    def __init__(self, raw: TextIO):
        self.raw = raw

    def write(self, text: str) -> int:
        self.raw.write(clean(text))
        return len(text)

    def flush(self) -> None:
        self.raw.flush()

    def isatty(self) -> bool:
        return self.raw.isatty()

    def fileno(self) -> int:
        return self.raw.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read-only in Python, an attribute in typeshed
        return self.raw.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]  # as encoding
        return self.raw.errors


@contextlib.contextmanager
def clean_streams() -> Iterator[None]:
    """Clean what is written to stdout and stderr within, and the traceback of what nobody caught.

    A stream that is closed, as some services start programs, is one to /dev/null: else the next file that is opened
    would get its number, and what children print. What the encoding of a stream lacks (an arrow in Latin-1, a file's
    name that is no Unicode) is written as its number.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the least number that is free
    before = sys.stdout, sys.stderr
    sys.excepthook = _print_cleaned
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # of one that became a pipe since it was opened; it is set all the same
                stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (CleanStream(raw(stream or open(os.devnull, "w"))) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def raw(stream: TextIO) -> TextIO:
    """Return the stream below a cleaned one."""
    return stream.raw if isinstance(stream, CleanStream) else stream


def _print_cleaned(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    print(clean("".join(traceback.format_exception(kind, error, where))), end="", file=sys.stderr)
