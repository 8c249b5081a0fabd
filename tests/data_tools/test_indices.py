"""Indices in ranges are what a set of the same numbers is, in order."""

import random

import pytest

from data_tools.base.indices import Indices


def numbers(chance: random.Random) -> list[int]:
    return [chance.randrange(30) for _ in range(chance.randrange(20))]


@pytest.mark.parametrize("seed", range(200))
def test_ranges_are_what_a_set_is(seed: int) -> None:
    chance = random.Random(seed)
    mine, theirs = numbers(chance), numbers(chance)
    a, b = Indices.of(mine), Indices.of(theirs)
    for ours, wanted in (
        (a, {*mine}), (a | b, {*mine} | {*theirs}), (a & b, {*mine} & {*theirs}), (a - b, {*mine} - {*theirs})
    ):  # fmt: skip
        assert list(ours) == sorted(wanted) == ours and len(ours) == len(wanted)
        assert [number for number in range(-1, 32) if number in ours] == sorted(wanted)
        assert [ours[place] for place in range(-len(ours), len(ours))] == 2 * sorted(wanted)
        assert all(end < first for (_, end), (first, _) in zip(ours.spans, ours.spans[1:]))
    first, rest = a.apart(count := chance.randrange(20))
    assert list(first) == sorted({*mine})[:count] and list(rest) == sorted({*mine})[count:]


def test_a_range_costs_as_much_as_its_ends() -> None:
    million = Indices.of(range(1_000_000))
    assert (million - Indices.of([5, 7])).spans == ((0, 5), (6, 7), (8, 1_000_000))
    assert million.spans == ((0, 1_000_000),) and Indices.of(range(3, 3)) == []
