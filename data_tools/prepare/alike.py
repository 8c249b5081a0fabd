"""Sets that are alike by their Jaccard similarity, found without comparing each with each.

Two sets of which at least the share t of all they have is common hold at least t·n of the n members of either. So, with
members in one order, each has one among its first n - ⌈t·n⌉ + 1 that is among those of the other (Chaudhuri, Ganti and
Kaushik, "A primitive operator for similarity joins in data cleaning", 2006: prefix filtering). In the order of how rare
members are, few sets share one.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

_ROUNDING = 1e-9  # relative: t·n and a similarity are rounded to 1e-16


def similarity(a: frozenset, b: frozenset) -> float:
    """Return the Jaccard similarity: what both have, of all that either has."""
    return len(a & b) / len(a | b)


class Alike:
    """Finds which of the sets that were added one is like, at a similarity of at least `least`."""

    def __init__(self, sets: Sequence[frozenset], least: float):
        self.sets, self.least = sets, least
        common = Counter(member for each in sets for member in each)
        self.first: list[list[Hashable]] = []
        for each in sets:
            rarest = sorted(each, key=lambda member: (common[member], member))
            self.first.append(rarest[: len(each) - math.ceil(least * len(each) * (1 - _ROUNDING)) + 1])
        self.holders: defaultdict[Hashable, list[int]] = defaultdict(list)

    def add(self, place: int) -> None:
        """Have the set at a place be found."""
        for member in self.first[place]:
            self.holders[member].append(place)

    def knows(self, place: int) -> bool:
        """Return whether a set that was added is like the one at a place."""
        near = {other for member in self.first[place] for other in self.holders.get(member, ())}
        return any(similarity(self.sets[place], self.sets[other]) >= self.least for other in near)
