"""Lists the rows that materialize left out, each with its place and the reason: STORE/left_out.jsonl.

    {"file": "/data/chats.jsonl", "line": 17, "bucket": "too_long", "reason": "5,120 tokens; max_tokens is 4,096"}

A line is counted from 1; of JSON, Parquet and CSV it is the row. An element writes places within its shares, with the
number of the source for a file; `join_left_out` makes the list of all elements, the same for any number of them. What
the settings chose to leave is counted on the balance sheet alone (UNLISTED, and what a recipe did not draw).
"""

import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from data_tools.base.one_file import Files
from data_tools.recipes.draw import BUCKETS, DUPLICATE

FILE = "left_out.jsonl"
UNLISTED = ("not_chosen",)
REASONS = {  # of buckets whose rows come without one
    "blank_line": "it is empty",
    "contaminated": "it holds a question of evaluation_sets",
    BUCKETS[DUPLICATE]: "the same text with the same loss mask as a row before it",
    "no_rows": "the task makes no row of it",
    "nothing_trained": "nothing of it would be in the loss",
    "unknown_character": "it has a character that the tokenizer does not know",
}
Place = tuple[int, dict[str, Any]]  # line, what is told of it


class LeftOut:
    """Writes the list of one element; the file is there only where a row was left out."""

    def __init__(self, folder: Path, max_tokens: int):
        self.path, self.max_tokens = folder / FILE, max_tokens
        self._file: IO[str] | None = None

    def add(self, source: int, line: int, bucket: str, reason: str, tokens: int = 0) -> None:
        """Add a row: the number of its source, its line in the share, and why it was left out."""
        if bucket in UNLISTED:
            return
        if bucket == "too_long" and not reason:
            reason = f"{tokens:,} tokens; max_tokens is {self.max_tokens:,}"
        if self._file is None:
            self._file = open(self.path, "w", encoding="utf-8")
        told = {"source": source, "line": line, "bucket": bucket, "reason": reason or _reason_of(bucket)}
        self._file.write(_spelled(told))

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()


def _reason_of(bucket: str) -> str:
    return REASONS.get(bucket, bucket.replace("_", " "))


def _spelled(told: dict[str, Any]) -> str:
    # a record may hold lone surrogates, which JSON spells and UTF-8 cannot
    return json.dumps(told, ensure_ascii=True) + "\n"


class _Part:
    """Reads the list of one element, source by source; between two sources it is not open, as there are thousands."""

    def __init__(self, folder: Path):
        self._folder, self._at = folder, 0

    def of(self, source: int, lines_before: int) -> Iterator[Place]:
        """Yield what it tells of a source, in the lines of the file."""
        files = Files(self._folder)
        if not files.has(FILE):
            return
        with files.open(FILE) as lines:
            lines.seek(self._at)
            for line in lines:
                told = json.loads(line)
                if told["source"] != source:
                    break
                self._at += len(line)
                yield told["line"] + lines_before, told
        files.close()


def join_left_out(
    parts: Sequence[Path],
    lines: Sequence[Sequence[int]],
    duplicates: Iterable[Iterator[int]],
    names: Sequence[str],
    out: Path,
) -> int:
    """Write the list of all elements, source by source and line by line; return how many rows it has.

    Args:
        parts: the elements' folders.
        lines: of each element the lines of each source that it read, [element][source].
        duplicates: of each source the lines of the rows that equal one before them, in order.
        names: of each source, the file that is named.
    """
    files = [_Part(part) for part in parts]
    written = 0
    with open(out / FILE, "w", encoding="utf-8") as file:
        for source, again in enumerate(duplicates):
            before, streams = 0, []
            for number, part in enumerate(files):
                streams.append(part.of(source, before))
                before += lines[number][source]
            equal = ((line, {"bucket": BUCKETS[DUPLICATE], "reason": REASONS[BUCKETS[DUPLICATE]]}) for line in again)
            # of several parts one after the other: a part may read its next source only after this one
            for line, told in heapq.merge(_chained(streams), equal, key=lambda place: place[0]):
                why = {"bucket": told["bucket"], "reason": told["reason"]}
                file.write(_spelled({"file": names[source], "line": line, **why}))
                written += 1
    if not written:
        (out / FILE).unlink()
    return written


def _chained(streams: Iterable[Iterator[Place]]) -> Iterator[Place]:
    for stream in streams:
        yield from stream
