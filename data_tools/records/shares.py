"""A file of records, cut into the shares of array elements: JSONL, JSON, Parquet and CSV.

Element i of n takes the records whose first byte lies in [i·size/n, (i+1)·size/n) of the file, so the shares of any n
elements, one after the other, are the file.

    JSONL           seek to the share
    JSONL.gz, .zst  bytes of the compressed file; an element unpacks what lies before its share, and skips it
    JSON            one list of records (or one record): an element parses the file and takes its share of the list
    Parquet         rows; an element reads the row groups that its share touches
    CSV             rows under a header, of texts; an element reads the file and takes its share of the rows

Where many elements would each read all of a large file that cannot be cut, they are refused (`too_costly`).

Compression and format are told by the file's first bytes, CSV by the name .csv, unless the format is named.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from data_tools.base.bounds import JSON, LINE, NoFile, open_regular
from data_tools.base.durable import CHUNK
from data_tools.base.json_text import json_value
from data_tools.mistake import Problem, UserMistake
from data_tools.records.blend_file import refuse_blend
from data_tools.records.csv_tables import read_table
from data_tools.records.parquet_share import ParquetShare
from data_tools.records.unpacking import BLOCK, unpack

FORMATS = ("auto", "jsonl", "json", "parquet", "csv")

MOST_READ_OVER = 64 << 30  # bytes of a file that its elements together read though they are not theirs

_SPACES = re.compile(r"[ \t\n\r]*")
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_BLOCK = BLOCK  # a line of a compressed file belongs to the element that holds the block it begins in


class Share(Protocol):
    """Says what one element reads of one file. `done` and `total` count `unit`s, for progress."""

    done: int
    total: int
    unit: str

    def __iter__(self) -> Iterator[Any]:
        """Return lines as bytes with their line end, or records.

        Raise UserMistake naming the file when it is damaged.
        """

    def place(self, number: int) -> str:
        """Return where record `number` of the share (from 1) stands: `FILE:LINE`."""


def open_share(path: Path, index: int = 0, count: int = 1, format: str = "auto") -> Share:
    """Return the share that element `index` of `count` takes of a file; with the defaults all of it.

    Raise UserMistake for a file that is not there, or is damaged or of no known format.
    """
    if why := too_costly(path, count, format):
        raise UserMistake(why)
    format, compression = _kind(path, format)
    if format == "parquet":
        return ParquetShare(path, index, count)
    if format == "csv":
        if compression:
            raise UserMistake(f"{path} is CSV under {compression}, which is not read; unpack it")
        return CsvShare(path, index, count)
    if format == "json":
        return JsonShare(path, index, count, compression)
    return PackedLines(path, index, count, compression) if compression else Lines(path, index, count)


def _kind(path: Path, format: str) -> tuple[str, str]:
    """Return (format, compression or "") of a file. Raise UserMistake where there is none."""
    try:
        with open_regular(path) as file:
            magic = file.read(4)
    except NoFile as error:
        raise UserMistake(f"{path} {error.strerror}; give files that exist") from None
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: of a name with \0
        raise UserMistake(f"no file {path}; give files that exist") from None
    compression = "gzip" if magic.startswith(_GZIP) else "zstd" if magic == _ZSTD else ""
    if format == "auto":
        format = "parquet" if magic == _PARQUET else _format_by_name(path, compression)
    return format, compression


def too_costly(path: Path, count: int, format: str = "auto") -> str:
    """Return why `count` elements should not share a file: each would read what is not its own; "" where they may.

    What all of them read over once is the size of the file for each element beyond the first, and of Parquet for each
    beyond the number of its row groups.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size * (count - 1) <= MOST_READ_OVER:
        return ""
    format, compression = _kind(path, format)
    if format == "jsonl" and not compression:
        return ""
    groups, what, remedy = 1, f"{format.upper()}", "give it as plain JSONL, which is cut anywhere"
    if compression:
        what, remedy = f"compressed by {compression}", "unpack it, or split it into several files"
    elif format == "parquet":
        groups = ParquetShare(path, 0, 1).file.num_row_groups
        what, remedy = f"Parquet of {groups} row group(s)", "write it anew with smaller row groups, or as JSONL"
    over = read_over(size, count, groups)
    return f"{path} is {what} and has {size / 2**30:,.1f} GiB: {over}; {remedy}" if over else ""


def read_over(size: int, count: int, groups: int = 1) -> str:
    """Return what it costs and allows where `count` elements read `size` bytes of which each `groups`-th part is cut
    off; "" where that is not too much.
    """
    if size * (count / max(1, groups) - 1) <= MOST_READ_OVER:
        return ""
    most = max(1, int(groups * (MOST_READ_OVER / size + 1)))
    return f"{count:,} elements would read it {count / max(1, groups):,.0f} times over; say array: {most} or less"


def check_shares(files: Iterable[tuple[str, Path]], count: int, format: str = "auto") -> list[Problem]:
    """Return what `too_costly` says of those of the (setting, file) that are there already."""
    return [Problem(where, why) for where, path in files if (why := too_costly(path, count, format))]


def _format_by_name(path: Path, compression: str) -> str:
    """Return csv or jsonl by the suffix; else JSON where the first line begins a list, is no whole record, or is
    all."""
    for format in ("csv", "jsonl"):
        if f".{format}" in map(str.lower, path.suffixes):
            return format
    begun, more = _first_line_of(path, compression)
    if begun.startswith(b"["):
        return "json"
    if not begun.startswith(b"{"):
        return "jsonl"
    try:
        json.loads(begun)
    except (ValueError, RecursionError):
        return "json"
    return "jsonl" if more else "json"


def _first_line_of(path: Path, compression: str) -> tuple[bytes, bool]:
    """Return the first line that is not blank and whether anything but blanks follows it, without more of the file than
    that takes: of a list, and of a line that is too long, only the beginning."""
    pieces, size, begun = list[bytes](), 0, b""
    for _, piece in unpack(path, compression):
        if begun:  # and ended
            if piece.strip():
                return begun, True
            continue
        pieces.append(piece if pieces else piece.removeprefix(codecs.BOM_UTF8).lstrip())
        size += len(pieces[-1])
        if not pieces[0]:
            pieces = []
        elif b"\n" in pieces[-1] or pieces[0].startswith(b"[") or size > LINE.most:
            begun, _, more = b"".join(pieces).partition(b"\n")
            if more.strip() or pieces[0].startswith(b"[") or size > LINE.most:
                return begun, True
    return begun or b"".join(pieces), False


class Lines:
    """Reads the lines of a plain file."""

    unit = "bytes"

    def __init__(self, path: Path, index: int, count: int):
        self.path = path
        size = path.stat().st_size
        start, self.stop = index * size // count, (index + 1) * size // count
        self.done, self.total = 0, self.stop - start
        with open(path, "rb") as file:
            self.first = _first_line(file, start)

    def __iter__(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            file.seek(self.first)
            position = self.first
            most, number = LINE.most, 0
            while position < self.stop and (line := file.readline(most + 1)):
                position, number = position + len(line), number + 1
                self.done = min(position - self.first, self.total)
                if len(line) > most:
                    raise UserMistake(f"{self.place(number)}: has {LINE.exceeded()}")
                yield line

    def place(self, number: int) -> str:
        return f"{self.path}:{_count_lines(self.path, self.first) + number}"


def _first_line(file: BinaryIO, start: int) -> int:
    """Return where the first line begins that begins at byte `start` or after it."""
    if start == 0:
        return 0
    file.seek(start - 1)
    place = start - 1
    while piece := file.readline(CHUNK):
        place += len(piece)
        if piece.endswith(b"\n"):
            break
    return place


def _count_lines(path: Path, stop: int) -> int:
    """Return the number of line feeds in the first `stop` bytes; asked only when an error needs a line number."""
    lines = 0
    with open(path, "rb") as file:
        while stop > 0 and (block := file.read(min(CHUNK, stop))):
            lines += block.count(b"\n")
            stop -= len(block)
    return lines


class PackedLines:
    """Reads the lines of a file under gzip or zstd."""

    unit = "bytes"

    def __init__(self, path: Path, index: int, count: int, compression: str):
        self.path, self.compression = path, compression
        blocks = -(-path.stat().st_size // _BLOCK)
        self.start, self.stop = index * blocks // count, (index + 1) * blocks // count
        self.done, self.total = 0, (self.stop - self.start) * _BLOCK
        self.skipped = 0  # lines before the share

    def __iter__(self) -> Iterator[bytes]:
        rest, size, begun = list[bytes](), 0, 0  # a line without its end, its bytes, and the block it begins in
        most, number = LINE.most, 0  # of the share
        for block, data in unpack(self.path, self.compression, _BLOCK):
            self.done = max(0, block - self.start) * _BLOCK
            *lines, last = data.split(b"\n")
            for place, line in enumerate(lines):
                first = begun if place == 0 and rest else block
                if first >= self.stop:
                    return
                if first < self.start:
                    self.skipped += 1
                    continue
                if place == 0 and rest:  # the pieces are let go of: whoever reads the line makes copies of it
                    line, rest = b"".join([*rest, line, b"\n"]), []
                else:
                    line += b"\n"
                number += 1
                self._check(number, len(line) - 1, most)
                yield line
            if lines or not rest:
                rest, size, begun = [], 0, block
            if last:
                size += len(last)
                rest.append(last)
            if begun >= self.stop:
                return
            self._check(number + 1, size, most)
        if rest and self.start <= begun < self.stop:
            yield b"".join(rest)

    def _check(self, number: int, size: int, most: int) -> None:
        """Raise UserMistake where a record is larger than is read."""
        if size > most:
            raise UserMistake(f"{self.place(number)}: has {LINE.exceeded()}")

    def place(self, number: int) -> str:
        return f"{self.path}:{self.skipped + number}"


class JsonShare:
    """Reads the records of one JSON list."""

    unit = "rows"

    def __init__(self, path: Path, index: int, count: int, compression: str):
        self.path = path
        try:
            self.text = _whole(path, compression).decode("utf-8-sig")
            value = json_value(self.text)
        except UnicodeDecodeError as error:
            raise UserMistake(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); mend the file") from None
        except ValueError as error:
            raise UserMistake(f"{path}: {error}; mend the file") from None
        refuse_blend(path, value)
        records = value if isinstance(value, list) else [value]
        self.first = index * len(records) // count
        self.records = records[self.first : (index + 1) * len(records) // count]
        self.done, self.total = 0, len(self.records)

    def __iter__(self) -> Iterator[Any]:
        for number, record in enumerate(self.records, 1):
            self.done = number
            yield record

    def place(self, number: int) -> str:
        """Return FILE:LINE of a record; the line is looked for only when an error needs it."""
        decoder = json.JSONDecoder()
        position = self._after_spaces(0)
        if self.text.startswith("[", position):
            position = self._after_spaces(position + 1)
            for _ in range(self.first + number - 1):
                position = self._after_spaces(decoder.raw_decode(self.text, position)[1])
                position = self._after_spaces(position + 1)  # behind the comma
        return f"{self.path}:{self.text.count(chr(10), 0, position) + 1}"

    def _after_spaces(self, position: int) -> int:
        spaces = _SPACES.match(self.text, position)
        return spaces.end() if spaces else position


def _whole(path: Path, compression: str) -> bytes:
    """Return all that a file holds. Raise UserMistake where that is more than is read in one piece."""
    pieces, size, most = list[bytes](), 0, JSON.most
    for _, piece in unpack(path, compression):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise UserMistake(f"{path} has {JSON.exceeded()}; or write it as JSON Lines, which is read line by line")
    return b"".join(pieces)


class CsvShare:
    """Reads the rows of a CSV file, each a mapping of its columns."""

    unit = "rows"

    def __init__(self, path: Path, index: int, count: int):
        table = read_table(path)
        self.path, self.columns, rows = path, table.columns, len(table.rows)
        share = slice(index * rows // count, (index + 1) * rows // count)
        self.rows, self.lines = table.rows[share], table.lines[share]
        self.done, self.total = 0, len(self.rows)

    def __iter__(self) -> Iterator[dict[str, str]]:
        for number, row in enumerate(self.rows, 1):
            self.done = number
            yield dict(zip(self.columns, row))

    def place(self, number: int) -> str:
        return f"{self.path}:{self.lines[number - 1]}"
