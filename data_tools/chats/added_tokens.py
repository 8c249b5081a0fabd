"""Where a text has added tokens, such as special ones: a tokenizer cuts them out before it does anything else."""

import re
from collections.abc import Iterable, Iterator

_FEW = 512  # tokens: one regular expression of them is quick; of more, its time at each character grows with them


class AddedTokens:
    """Finds added tokens in texts, the leftmost first, and of those at one place the longest, as `tokenizers` does.

    The time for a text does not grow with their number, of which a tokenizer may have a million.
    """

    def __init__(self, contents: Iterable[str]):
        self._all = frozenset(filter(None, contents))
        lengths: dict[str, set[int]] = {}
        for token in self._all:
            lengths.setdefault(token[0], set()).add(len(token))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        longest_first = sorted(self._all if len(self._all) <= _FEW else lengths, key=len, reverse=True)
        self._found = re.compile("|".join(map(re.escape, longest_first)) or "(?!)").search

    def places(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of each, in order."""
        place = 0
        while found := self._found(text, place):
            start, place = found.span()
            if len(self._all) > _FEW:  # what was found is how some token begins
                pieces = (text[start : start + length] for length in self._lengths[text[start]])
                token = next((piece for piece in pieces if piece in self._all), "")
                if not token:
                    continue
                place = start + len(token)
            yield start, place

    def cut(self, text: str) -> Iterator[tuple[int, str, bool]]:
        """Yield (start, piece, whether it is an added token) of the whole text, in order, without empty pieces."""
        place = 0
        for start, stop in self.places(text):
            if place < start:
                yield place, text[place:start], False
            yield start, text[start:stop], True
            place = stop
        if place < len(text):
            yield place, text[place:], False
