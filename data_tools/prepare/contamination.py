"""Contamination: which texts hold a question of an evaluation set, however it is spelled.

Texts are compared as words: lower case, no punctuation, one character of a script without spaces, and in one form of
Unicode (NFKC), so that accents and wide characters do not matter. A text holds a
question when it has `ngram` of its words in a row; of a shorter question all of them, where these are SHORTEST or more;
and of any question when it is that question and nothing else.

The questions' words are numbered. Runs of them are found by 64-bit hashes, sorted, and then compared word by word, so
that a hit is one. Memory: about 16 bytes for each word of the questions, whatever the texts are.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.records import readers

QUESTIONS = ("question", "problem", "prompt", "instruction", "input")  # keys of an evaluation set's questions
NGRAM = 13  # words; what is usual since GPT-3 (Brown et al., 2020, appendix C)
SHORTEST = 5  # words; a shorter question is in too many texts

_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]|[^\W_぀-ヿ㐀-鿿가-힯]+")  # a character of a script without spaces is a word
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: hashes of runs are polynomials of it modulo 2^64


def words(text: str) -> list[str]:
    return _WORD.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).lower())


class Hit(NamedTuple):
    """Says which question a text holds: the set's name, the question's number in it, and the words they share."""

    evaluation: str
    number: int
    shared: str
    is_whole: bool  # whether all of the question is there


class _Runs(NamedTuple):
    """Holds the runs of one length, sorted by hash."""

    hashes: np.ndarray  # uint64[runs]
    starts: np.ndarray  # int64[runs], places in all questions' words


class Contamination:
    """Represents the questions of evaluation sets."""

    def __init__(self, ngram: int):
        self.ngram = ngram
        self._numbers: dict[str, int] = {}  # word -> number from 1; 0 is a word of no question
        self._words: list[np.ndarray] = []  # of each question
        self._names: list[tuple[str, int]] = []
        self._whole: dict[bytes, int] = {}  # all words of a question -> its place
        self._frozen: tuple[np.ndarray, np.ndarray, dict[int, _Runs]] | None = None

    def __len__(self) -> int:
        return len(self._names)

    def add(self, evaluation: str, questions: Iterable[str]) -> None:
        """Add the questions of one evaluation set, numbered in their order."""
        for number, question in enumerate(questions):
            numbers = [self._numbers.setdefault(word, len(self._numbers) + 1) for word in words(question)]
            if numbers:
                self._whole.setdefault(np.array(numbers, dtype=np.int32).tobytes(), len(self._names))
                self._words.append(np.array(numbers, dtype=np.int32))
                self._names.append((evaluation, number))
        self._frozen = None

    def add_files(self, files: Sequence[Path]) -> "Contamination":
        """Add the questions of files; return itself. Raise UserMistake for a record without one."""
        for file in files:
            self.add(file.name, (text for record in readers.records(file) for text in questions_of(record)))
        return self

    def touches(self, text: str) -> bool:
        return self.find(text) is not None

    def find(self, text: str) -> Hit | None:
        """Return a question that the text holds, None where it holds none."""
        if not self._names:
            return None
        spelled = words(text)
        numbers = np.array([self._numbers.get(word, 0) for word in spelled], dtype=np.int32)
        place = self._whole.get(numbers.tobytes())
        if place is not None:
            return Hit(*self._names[place], " ".join(spelled), True)
        every, question_at, runs = self._index()
        for size, known in runs.items():
            for start, at in _matches(numbers, size, known, every):
                place = int(question_at[at])
                is_whole = size == len(self._words[place])
                return Hit(*self._names[place], " ".join(spelled[start : start + size]), is_whole)
        return None

    def _index(self) -> tuple[np.ndarray, np.ndarray, dict[int, _Runs]]:
        """Return (all questions' words, the question that each is of, the runs by their length)."""
        if self._frozen is None:
            lengths = [len(question) for question in self._words]
            every = np.concatenate(self._words)
            ends = np.cumsum(lengths)
            starts_of: dict[int, list[np.ndarray]] = defaultdict(list)
            for length, end in zip(lengths, ends.tolist()):
                size = min(self.ngram, length)
                if size >= SHORTEST:
                    starts_of[size].append(np.arange(end - length, end - size + 1))
            runs = {size: _sorted(every, np.concatenate(starts), size) for size, starts in sorted(starts_of.items())}
            self._frozen = every, np.repeat(np.arange(len(lengths)), lengths), runs
        return self._frozen


def _sorted(every: np.ndarray, starts: np.ndarray, size: int) -> _Runs:
    hashes = _hashes(every, size)[starts]
    order = np.argsort(hashes, kind="stable")
    return _Runs(hashes[order], starts[order])


def _hashes(numbers: np.ndarray, size: int) -> np.ndarray:
    """Return uint64[n - size + 1], a hash of each run of `size` words; none of fewer words."""
    count = max(0, len(numbers) - size + 1)
    mixed = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    mixed ^= mixed >> np.uint64(32)
    total = np.zeros(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for place in range(size if count else 0):
            total = total * _BASE + mixed[place : place + count]
    return total


def _matches(numbers: np.ndarray, size: int, known: _Runs, every: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (first word in the text, first word among all questions') of runs that are equal, word by word."""
    hashes = _hashes(numbers, size)
    places = np.searchsorted(known.hashes, hashes)
    found = np.flatnonzero(known.hashes[np.minimum(places, len(known.hashes) - 1)] == hashes)
    for start in found.tolist():
        for place in range(int(places[start]), len(known.hashes)):
            if known.hashes[place] != hashes[start]:
                break
            at = int(known.starts[place])
            if np.array_equal(every[at : at + size], numbers[start : start + size]):
                yield start, at


# -- texts of records -------------------------------------------------------------------------------------------------


def questions_of(record: readers.Record) -> list[str]:
    """Return the questions of a record of an evaluation set. Raise UserMistake where it has none and would keep nothing
    out."""
    if record.is_blank:
        return []
    row, found = record.value, []
    if isinstance(row, dict):
        found = [value for key, value in row.items() if key.lower() in QUESTIONS and isinstance(value, str)]
        found += texts_of(row.get("messages"), ("user", "human")) + texts_of(row.get("prompt"), ("user", "human"))
    found = [text for text in found if words(text)]
    if not found:
        reason = record.problem or f"no words of a question under {', '.join(QUESTIONS)} or in messages"
        raise record.mistake(reason, "mend the evaluation set, or name its questions so")
    return found


def texts_of(messages: Any, roles: Sequence[str] = ()) -> list[str]:
    """Return the texts of messages of these roles, or of all; of contents in parts, those of the parts."""
    said = []
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, dict) and (not roles or message.get("role") in roles):
            content = message.get("content")
            parts = content if isinstance(content, list) else [content]
            texts = [part.get("text", part.get("value")) if isinstance(part, dict) else part for part in parts]
            said += [text for text in texts if isinstance(text, str)]
    return said


def every_text(value: Any) -> Iterator[str]:
    """Yield every text that a record holds at any depth, so that no schema need be known; keys are none."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from every_text(inner)
