"""pass@k and maj@k equal what counting all subsets gives; intervals hold what they are defined to hold."""

import itertools
from collections import Counter

import numpy as np
import pytest

from data_tools.tasks.estimators import RESAMPLES, Z, at_k, bootstrap, majority_at_k, pass_at_k, standard_error, wilson


@pytest.mark.parametrize("right", [[0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [1, 1, 1, 1, 0], [1] * 5])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, k):
    subsets = list(itertools.combinations(right, k))
    assert pass_at_k(5, sum(right), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_votes_count_ties_as_chances_and_silence_not_at_all():
    assert majority_at_k(["4", "5", "4", None], [True, False, True, False], 4) == 1
    assert majority_at_k(["4", "5", None, None], [True, False, False, False], 4) == 0.5
    assert majority_at_k([None, None], [False, False], 2) == 0


def test_an_answer_with_several_verdicts_is_right_with_their_mean():
    """None of the orders of equal answers makes one of the verdicts the last."""
    votes = [("2", True)] + [("2", False)] * 7
    for order in (votes, votes[::-1]):
        found = at_k([order])
        assert found["pass@1"] == 0.125 and {found[f"maj@{k}"] for k in (1, 2, 4, 8)} == {0.125}, found


def enumerated(answers, right, k):
    """maj@k by its definition: over all subsets, over the winners of each, the mean verdict of the winner's samples."""
    total = 0.0
    subsets = list(itertools.combinations(range(len(answers)), k))
    mean = {a: np.mean([r for b, r in zip(answers, right) if b == a]) for a in set(answers)}
    for subset in subsets:
        votes = Counter(answers[i] for i in subset if answers[i] is not None)
        tied = [a for a, n in votes.items() if n == max(votes.values())]
        total += sum(mean[a] for a in tied) / len(tied) if tied else 0.0
    return total / len(subsets)


def test_majority_is_exactly_the_mean_over_all_subsets():
    """The bound: at most 2^8 additions and as many multiplications, each with a relative error of half an epsilon."""
    random = np.random.default_rng(0)
    for _ in range(150):
        n = int(random.integers(1, 9))
        answers = random.choice(["a", "b", "c", None], n).tolist()
        right = random.integers(0, 2, n).astype(bool).tolist()
        for k in range(1, n + 1):
            exact = enumerated(answers, right, k)
            assert abs(majority_at_k(answers, right, k) - exact) <= 2**8 * np.finfo(float).eps, (answers, right, k)


def test_majority_of_many_samples_needs_no_chance():
    """8 of 20 samples, twice the same; maj@1 is the share of right ones however many answers there are."""
    answers, right = ["4", "4", "5", "6", "6"] * 4, [True, True, False, False, False] * 4
    assert majority_at_k(answers, right, 8) == majority_at_k(answers[::-1], right[::-1], 8)
    assert majority_at_k(answers, right, 1) == pytest.approx(0.4, abs=2**8 * np.finfo(float).eps)
    assert majority_at_k([str(i) for i in range(256)], [i == 7 for i in range(256)], 256) == pytest.approx(1 / 256)


def test_means_over_prompts_for_every_power_of_two_that_all_prompts_have():
    prompts = [[("4", True), ("5", False), (None, False), ("4", True)], [("7", False)] * 5]
    found = at_k(prompts)
    assert list(found) == ["pass@1", "maj@1", "pass@2", "maj@2", "pass@4", "maj@4"]
    assert found["pass@1"] == 0.25 and found["pass@4"] == 0.5 == found["maj@4"]
    assert found == at_k([votes[::-1] for votes in prompts[::-1]])
    assert list(at_k([[(None, True), (None, False)]])) == ["pass@1", "pass@2"] and at_k([]) == {}


def test_impossible_k_are_refused():
    for call in (lambda: pass_at_k(3, 1, 4), lambda: majority_at_k(["1"], [True], 2)):
        with pytest.raises(ValueError):
            call()
    assert standard_error([0.0, 1.0]) == 0.5
    assert standard_error([1.0]) is None  # one value does not say how far others are from it


@pytest.mark.parametrize("right, of", [(0, 1), (0, 30), (3, 30), (30, 30), (659, 1319)])
def test_the_ends_of_wilsons_interval_are_the_shares_that_are_just_not_refused(right, of):
    """Of both ends p it holds that |seen - p| = Z √(p (1 - p) / n): the score test's own edge."""
    low, high = wilson(right, of)
    for p in (low, high):
        assert abs((right / of - p) ** 2 - Z * Z * p * (1 - p) / of) < 1e-12
    assert 0 <= low <= right / of <= high <= 1 and high - low > 0


def test_a_bootstrap_draws_prompts_as_all_draws_would_and_is_the_same_in_any_order():
    """Of 4 prompts there are 256 equally likely draws; their means are counted."""
    values = [0.0, 0.25, 0.25, 1.0]
    means = sorted(np.mean(draw) for draw in itertools.product(values, repeat=4))
    found = bootstrap({"a": values}, 0.0)
    many = np.random.default_rng(1).random((2, 40)).tolist()
    ordered, turned = (bootstrap({"a": a, "b": b}, 0.0) for a, b in (many, [each[::-1] for each in many]))
    assert ordered == turned and ordered["a"] != ordered["b"]
    for end, share in zip(found["a"], (0.025, 0.975)):
        # So many deviations of a share of RESAMPLES draws are never seen.
        room = 6 * np.sqrt(share * (1 - share) / RESAMPLES)
        below, up_to = np.mean(np.less(means, end - 1e-9)), np.mean(np.less(means, end + 1e-9))
        assert below <= share + room and up_to >= share - room


def test_prompts_that_are_all_alike_leave_an_interval_that_is_no_point():
    """0 of 30 is no proof of 0%: the interval is Wilson's, and that of a difference reaches both ways."""
    assert bootstrap({"a": [0.0] * 30}, 0.0)["a"] == pytest.approx(wilson(0, 30))
    assert bootstrap({"a": [1.0] * 30}, 0.0)["a"] == pytest.approx(wilson(30, 30))
    low, high = bootstrap({"a": [0.0] * 30}, -1.0)["a"]
    assert low == -high == pytest.approx(-wilson(0, 30)[1])
    assert bootstrap({"reward": [7.5] * 3})["reward"] == (7.5, 7.5)  # nothing is known of other prompts' rewards
