"""Keeps ascending indices as ranges, so that those of 100,000 elements that wait are as cheap as those of two."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any


class Indices(Sequence[int]):
    """A set of indices in ascending order; costs grow with the ranges, not with the indices.

    It equals any sequence of the same numbers in the same order.
    """

    __slots__ = ("spans", "_count")

    def __init__(self, spans: Iterable[tuple[int, int]] = ()):
        """Take (first, end) of each range, ascending, that neither overlap nor touch; `end` is one after the last."""
        self.spans = tuple(spans)
        self._count = sum(end - first for first, end in self.spans)

    @staticmethod
    def of(indices: Iterable[int]) -> "Indices":
        """Return the set of these indices, which may come in any order and more than once."""
        if isinstance(indices, Indices):
            return indices
        if isinstance(indices, range) and indices.step == 1:
            return Indices([(indices.start, indices.stop)] if indices else [])
        return Indices.of_spans((index, index + 1) for index in indices)

    @staticmethod
    def of_spans(spans: Iterable[tuple[int, int]]) -> "Indices":
        """Return the union of ranges (first, end), which may come in any order, overlap and be empty."""
        merged: list[tuple[int, int]] = []
        begin = stop = 0
        for first, end in sorted(spans):
            if end <= first:
                continue
            if begin < stop and first <= stop:
                stop = max(stop, end)
                continue
            if begin < stop:
                merged.append((begin, stop))
            begin, stop = first, end
        return Indices([*merged, (begin, stop)] if begin < stop else merged)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(range(first, end) for first, end in self.spans)

    def __contains__(self, index: object) -> bool:
        if not isinstance(index, int):
            return False
        at = bisect_right(self.spans, (index, float("inf"))) - 1
        return at >= 0 and index < self.spans[at][1]

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(self._count))]
        left = place if place >= 0 else place + self._count
        for first, end in self.spans if left >= 0 else ():
            if left < end - first:
                return first + left
            left -= end - first
        raise IndexError(place)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Indices):
            return self.spans == other.spans
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def __hash__(self) -> int:
        return hash(self.spans)

    def __repr__(self) -> str:
        return f"Indices({self.spans!r})"

    def apart(self, count: int) -> "tuple[Indices, Indices]":
        """Return the first `count` indices, and the others."""
        left = count
        for at, (first, end) in enumerate(self.spans):
            if left < end - first:
                own = [(first, first + left)] if left else []
                return Indices([*self.spans[:at], *own]), Indices([(first + left, end), *self.spans[at + 1 :]])
            left -= end - first
        return self, Indices()

    def __or__(self, other: "Indices") -> "Indices":
        return Indices.of_spans([*self.spans, *other.spans])

    def __and__(self, other: "Indices") -> "Indices":
        few, many = (self, other) if len(self.spans) <= len(other.spans) else (other, self)
        found = []
        for first, end in few.spans:
            for at in range(many._reaching(first), len(many.spans)):
                begin, stop = many.spans[at]
                if begin >= end:
                    break
                found.append((max(first, begin), min(end, stop)))
        return Indices(found)

    def __sub__(self, other: "Indices") -> "Indices":
        left = []
        for first, end in self.spans:
            for at in range(other._reaching(first), len(other.spans)):
                begin, stop = other.spans[at]
                if begin >= end:
                    break
                if first < begin:
                    left.append((first, begin))
                first = stop
            if first < end:
                left.append((first, end))
        return Indices(left)

    def _reaching(self, index: int) -> int:
        """Return the place of the first range that ends after an index."""
        at = bisect_right(self.spans, (index, float("inf"))) - 1
        return at if at >= 0 and self.spans[at][1] > index else at + 1
