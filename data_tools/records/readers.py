"""THE way to read records: of whole files, of an element's share of one, or one that a share gave.

    for record in records(path):      # every record of a file of any format that shares.py knows
        if record.is_blank: …
        if record.problem: raise record.mistake()
        use(record.value)

One set of errors: a file that is not there or damaged is a UserMistake that names it; a line that holds no record has a
`problem`, and `mistake` says it with FILE:LINE.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.base.json_text import json_line, json_value
from data_tools.base.one_file import open_part
from data_tools.mistake import Problem, UserMistake
from data_tools.records.shares import Share, open_share


class Place:
    """Says FILE:LINE of a record, counted only when it is told."""

    def __init__(self, share: Share, number: int):
        self.share, self.number = share, number

    def __str__(self) -> str:
        return self.share.place(self.number)


class Record(NamedTuple):
    """Holds what stands at a place of a file: a value, or why there is none. A line that is blank has neither."""

    place: object  # its str() is FILE:LINE
    value: Any
    problem: str = ""
    is_blank: bool = False

    def mistake(self, problem: str = "", remedy: str = "mend the record") -> UserMistake:
        """Return the error that tells what is wrong with the record (its own problem, or the given one), and where."""
        return UserMistake(Problem(str(self.place), f"{problem or self.problem}; {remedy}"))

    def line(self, value: Any) -> str:
        """Return what is kept of the record as a line of JSON Lines. Raise UserMistake where JSON lacks it: a date."""
        try:
            return json_line(value)
        except TypeError as error:  # of Parquet
            raise self.mistake(f"cannot be written as JSON Lines: {error}", "write that column as text") from None


def records(path: Path, format: str = "auto") -> Iterator[Record]:
    """Yield every record of a file in its order, blank lines too. Raise UserMistake where it cannot be read at all."""
    return records_of(open_share(path, format=format))


def records_of_part(path: Path) -> Iterator[Record]:
    """Yield every record of a JSONL file that an element left, by itself or in its part.zip (base/one_file.py)."""
    with open_part(path) as file:
        for number, raw in enumerate(file, 1):
            yield record_of(raw, f"{path}:{number}")


def records_of(share: Share) -> Iterator[Record]:
    """Yield every record of a share in its order, blank lines too. Raise UserMistake where the file is damaged."""
    for number, raw in enumerate(share, 1):
        yield record_of(raw, Place(share, number))


def record_of(raw: Any, place: object = None) -> Record:
    """Return the record that a share gave: a line as bytes, or a value that was read from JSON, Parquet or CSV."""
    if not isinstance(raw, bytes):
        return Record(place, raw)
    if is_blank(raw):
        return Record(place, None, is_blank=True)
    try:
        return Record(place, json_value(text_of(raw)))
    except ValueError as error:
        return Record(place, None, str(error))


def is_blank(raw: Any) -> bool:
    """Return whether a record as a share gives it is a line with nothing on it."""
    return isinstance(raw, bytes) and not raw.strip()


def text_of(raw: Any) -> str:
    """Return the JSON text of a record as a share gives it, dates of Parquet as text. Raise ValueError with the reason
    where it is not UTF-8."""
    if not isinstance(raw, bytes):
        return json.dumps(raw, default=str)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from None
