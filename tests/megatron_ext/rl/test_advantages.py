import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.rl.advantages import advantages, equal_groups, overlong_penalty
from megatron_ext.rl.settings import Advantage

NAN = float("nan")


def of(rewards: list[float], **settings: object) -> list[float]:
    return advantages(np.array(rewards), np.zeros(len(rewards), dtype=int), Advantage(**settings)).tolist()


def test_a_reward_nobody_could_give_counts_nowhere() -> None:
    """TRL's numbers since 1.6; before, NaN became 0 and took part in the mean."""
    assert of([1, NAN, 0, -0.5], scale="none") == pytest.approx([5 / 6, 0, -1 / 6, -2 / 3])
    assert of([NAN, NAN]) == [0, 0] and of([3, NAN], scale="none") == [0, 0]


def test_deviations_are_of_the_sample_and_leave_one_out_compares_with_the_others() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5]
    mean, deviation = np.mean(rewards), np.std(rewards, ddof=1)
    assert of(rewards) == pytest.approx([(r - mean) / (deviation + 1e-4) for r in rewards])
    others = [r - (sum(rewards) - r) / 4 for r in rewards]
    assert of(rewards, baseline="leave_one_out", scale="none") == pytest.approx(others)


def test_the_batch_scale_is_one_number_for_all_groups() -> None:
    rewards, groups = np.array([0.0, 1.0, 4.0, 6.0]), np.array([0, 1, 1, 0])
    scaled = advantages(rewards, groups, Advantage(scale="batch", epsilon=0.0))
    assert scaled == pytest.approx(np.array([-3, -1.5, 1.5, 3]) / np.std(rewards, ddof=1))


rewards_of = st.lists(st.tuples(st.sampled_from([0.0, 1.0, -0.5, NAN]), st.integers(0, 3)), min_size=1, max_size=30)


@given(rewards_of, st.sampled_from(["mean", "leave_one_out"]), st.sampled_from(["none", "group", "batch"]))
def test_advantages_of_a_group_add_up_to_nothing_and_order_as_its_rewards(
    drawn: list[tuple[float, int]], baseline: str, scale: str
) -> None:
    rewards, groups = np.array([r for r, _ in drawn]), np.array([g for _, g in drawn])
    found = advantages(rewards, groups, Advantage(baseline, scale))
    assert np.isfinite(found).all() and (found[np.isnan(rewards)] == 0).all()
    for group in set(groups.tolist()):
        mine, given_ = found[groups == group], rewards[groups == group]
        assert abs(mine.sum()) < 1e-8
        known = ~np.isnan(given_)
        assert (np.diff(mine[known][np.argsort(given_[known], kind="stable")]) >= -1e-12).all()


def test_groups_without_variance_are_found() -> None:
    rewards = np.array([1, 1, NAN, 0, 1, NAN, NAN])
    assert equal_groups(rewards, np.array([0, 0, 0, 1, 1, 2, 3])).tolist() == [True, False, True, True]


def test_the_overlong_penalty_falls_over_the_last_tokens() -> None:
    assert overlong_penalty(np.array([0, 80, 90, 100, 120]), limit=100, cache=20).tolist() == [0, 0, -0.5, -1, -1]
