"""Which samples an update trains, and how rows share them out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.rl.samples import Sample, batch_of, deal, kept_items, rewards_of
from megatron_ext.rl.settings import Advantage, Rewarding

PLAIN = Advantage(scale="none", drop_equal_groups=True)


def sample(item: int, number: int, reward, tokens: int = 3, finish: str = "stop") -> Sample:
    return Sample(item, number, (1, 2), np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.float32), finish, reward)


def test_truncated_and_unscorable_samples_are_masked_and_never_counted_as_zero():
    drawn = [sample(0, 0, 1.0), sample(0, 1, None), sample(0, 2, 0.0), sample(0, 3, 1.0, finish="length"),
             sample(0, 4, float("nan"))]  # fmt: skip
    batch = batch_of(drawn, {0}, PLAIN, Rewarding(), limit=8)
    assert batch.trained.tolist() == [True, False, True, False, False]
    assert batch.advantages.tolist() == [0.5, 0, -0.5, 0, 0]  # the mean is that of the two
    counted = batch_of(drawn, {0}, PLAIN, Rewarding(mask_truncated=False), limit=8)
    assert counted.trained.tolist() == [True, False, True, True, False]


def test_groups_that_all_got_the_same_are_dropped_where_asked():
    drawn = [sample(0, i, 1.0) for i in range(3)] + [sample(1, i, float(i)) for i in range(3)]
    drawn += [sample(2, 0, None), sample(2, 1, 1.0), sample(2, 2, 1.0)]
    assert kept_items(drawn, PLAIN, Rewarding(), 8) == {1}
    assert kept_items(drawn, Advantage(drop_equal_groups=False), Rewarding(), 8) == {0, 1, 2}
    assert kept_items([], PLAIN, Rewarding(), 8) == set()


def test_long_samples_lose_up_to_one():
    drawn = [sample(0, 0, 1.0, tokens=6), sample(0, 1, 1.0, tokens=9), sample(0, 2, 1.0, tokens=10, finish="length")]
    found = rewards_of(drawn, Rewarding(mask_truncated=False, overlong_tokens=4), limit=10)
    assert found.tolist() == [1.0, 0.25, 0.0]
    assert np.isnan(rewards_of(drawn, Rewarding(overlong_tokens=4), limit=10)[2])


def test_a_batch_does_not_depend_on_the_order_of_arrival():
    drawn = [sample(i // 3, i % 3, float(i % 2)) for i in range(9)]
    one, other = (batch_of(order, {0, 1, 2}, PLAIN, Rewarding(), 8) for order in (drawn, drawn[::-1]))
    assert [s.key for s in one.samples] == [s.key for s in other.samples]
    assert one.advantages.tolist() == other.advantages.tolist()


@given(st.lists(st.integers(1, 90), max_size=40), st.integers(1, 5), st.integers(10, 120), st.sampled_from([1, 2]))
def test_every_sample_is_dealt_once_in_rows_of_bounded_length(lengths, ranks, row_tokens, unit):
    dealt = deal(np.array(lengths, dtype=np.int64), ranks, row_tokens, unit)
    assert len({len(rows) for rows in dealt}) == 1 and len(dealt) == ranks and len(dealt[0]) % unit == 0
    assert sorted(place for rows in dealt for row in rows for place in row) == list(range(len(lengths)))
    longest = max([row_tokens, *lengths])
    assert all(sum(lengths[place] for place in row) <= longest for rows in dealt for row in rows)


def test_ranks_get_as_many_tokens_but_for_the_longest_sample():
    lengths = np.random.default_rng(0).integers(50, 4000, 512)
    loads = [sum(lengths[place] for row in rows for place in row) for rows in deal(lengths, 8, 16384)]
    assert max(loads) - min(loads) <= 4000 and max(loads) == pytest.approx(lengths.sum() / 8, rel=0.01)
