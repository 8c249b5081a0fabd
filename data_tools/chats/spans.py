"""Places of turns in a rendered text, and how the marks of a rendering (data_tools/chats/template.py) give them."""

import os
import re
from bisect import bisect
from collections.abc import Iterator
from typing import NamedTuple

from data_tools.chats.template import CLOSE, LOOP_END, OPEN, TemplateError


class Span(NamedTuple):
    """Says that text[start:stop] is what the assistant wrote in message `message`, its stop token included."""

    message: int
    start: int
    stop: int


class Rendered(NamedTuple):
    text: str
    spans: list[Span]
    by_prefixes: bool = False


class Stop(NamedTuple):
    """Says what ends a turn, and what the template writes behind it up to the last character that is no space."""

    text: str
    rest: str


class Unclear(TemplateError):
    """Raised where a turn's beginning or end cannot be told in this way; str() is one line."""


def common(one: str, other: str) -> int:
    """Return how many characters the texts begin with alike, but none of a tag that they do not share."""
    length = len(os.path.commonprefix([one, other]))
    if length in (len(one), len(other)):
        return length
    for opening, closing in ("<>", "[]"):
        begun = one.rfind(opening, 0, length)
        if begun >= 0 and one.find(closing, begun, length) < 0 and not re.search(r"\s", one[begun:length]):
            length = begun
    return length


def loop_pieces(marks: list[tuple[int, str]], end: int, roles: list[str]) -> Iterator[Span]:
    """Yield what each message's pass through the loop wrote; several loops may pass over a message, most write
    nothing."""
    bounds = [(place, mark) for place, mark in marks if mark not in (OPEN, CLOSE)]
    written: dict[int, Span] = {}
    for (start, mark), (stop, _) in zip(bounds, [*bounds[1:], (end, LOOP_END)]):
        if mark == LOOP_END or start == stop:
            continue
        message = int(mark)
        if message in written and roles[message] == "assistant":
            raise Unclear(f"it writes message {message + 1} twice")
        written[message] = Span(message, start, stop)
    yield from sorted(written.values(), key=lambda span: span.start)


def block_spans(marks: list[tuple[int, str]], pieces: list[Span], roles: list[str]) -> list[Span]:
    """Return the generation blocks, each with the last turn that began before it; without a loop the turns in their
    order."""
    opens = [place for place, mark in marks if mark == OPEN]
    closes = [place for place, mark in marks if mark == CLOSE]
    turns = [number for number, role in enumerate(roles) if role == "assistant"]
    begun = [piece for piece in pieces if roles[piece.message] == "assistant"]
    if begun:
        starts = [piece.start for piece in begun]
        if opens and opens[0] < starts[0]:
            raise TemplateError("a generation block begins before the first assistant's turn")
        turns = [begun[bisect(starts, place) - 1].message for place in opens]
    if len(turns) != len(opens):
        raise TemplateError(f"{len(opens)} generation blocks for {len(turns)} assistant turns")
    return [Span(*span) for span in zip(turns, opens, closes)]
