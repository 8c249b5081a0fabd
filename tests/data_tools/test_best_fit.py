import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_tools.packs.best_fit import best_fit, longest_first


def by_hand(sizes: list[int], capacity: int, apart: list[int]) -> list[int]:
    """Best fit by looking at every open pack: the least free space, of equal ones the pack that last changed."""
    free: list[int] = []
    changed: list[int] = []
    held: list[set[int]] = []
    chosen = []
    for place, (size, group) in enumerate(zip(sizes, apart)):
        open_ = [i for i in range(len(free)) if free[i] >= size and not (group >= 0 and group in held[i])]
        if open_:
            pack = min(open_, key=lambda i: (free[i], -changed[i]))
        else:
            pack = len(free)
            free.append(capacity)
            changed.append(0)
            held.append(set())
        free[pack] -= size
        changed[pack] = place
        held[pack].add(group)
        chosen.append(pack)
    return chosen


@given(
    st.sampled_from([1, 50, 5000, 262_144]), st.lists(st.tuples(st.floats(0.001, 1), st.integers(-1, 4)), max_size=80)
)
def test_each_document_goes_into_the_fullest_pack_that_may_hold_it(
    capacity: int, drawn: list[tuple[float, int]]
) -> None:
    sizes = [max(1, int(share * capacity)) for share, _ in drawn]
    groups = [group for _, group in drawn]
    for apart in (groups, [-1] * len(sizes)):
        packs, count = best_fit(np.array(sizes), capacity, np.array(apart, dtype=np.int64))
        assert packs.tolist() == by_hand(sizes, capacity, apart)
        assert count == len(set(packs.tolist()))
    assert best_fit(np.array(sizes), capacity)[0].tolist() == packs.tolist()


@given(st.lists(st.integers(1, 300), max_size=80))
def test_longest_first_is_a_stable_order(sizes: list[int]) -> None:
    assert longest_first(np.array(sizes), 300).tolist() == np.argsort(-np.array(sizes), kind="stable").tolist()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80))
def test_decreasing_best_fit_is_within_its_bound(sizes: list[int]) -> None:
    _, count = best_fit(np.array(sorted(sizes, reverse=True)), 50)
    assert count <= 11 / 9 * max(-(-sum(sizes) // 50), sum(size > 25 for size in sizes)) * 1.5 + 1
