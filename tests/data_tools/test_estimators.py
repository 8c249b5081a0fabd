"""pass@k and maj@k equal what counting all subsets gives."""

import itertools
from collections import Counter

import numpy as np
import pytest

from data_tools.estimators import at_k, majority_at_k, pass_at_k, standard_error


@pytest.mark.parametrize("right", [[0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [1, 1, 1, 1, 0], [1] * 5])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, k):
    subsets = list(itertools.combinations(right, k))
    assert pass_at_k(5, sum(right), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_votes_count_ties_as_chances_and_silence_not_at_all():
    assert majority_at_k(["4", "5", "4", None], [True, False, True, False], 4) == 1
    assert majority_at_k(["4", "5", None, None], [True, False, False, False], 4) == 0.5
    assert majority_at_k([None, None], [False, False], 2) == 0


def test_majority_of_fewer_is_that_of_the_subsets():
    answers, right = ["4", "4", "5", "6", "6"], [True, True, False, False, False]

    def of(subset):
        votes = Counter(answers[i] for i in subset)
        tied = [a for a, n in votes.items() if n == max(votes.values())]
        return sum(a == "4" for a in tied) / len(tied)

    exact = np.mean([of(subset) for subset in itertools.combinations(range(5), 3)])
    assert majority_at_k(answers, right, 3) == pytest.approx(exact)
    many = answers * 4, right * 4  # more subsets than are looked at
    assert majority_at_k(*many, 10) == majority_at_k(*many, 10) != majority_at_k(*many, 10, seed=1)


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
    assert standard_error([1.0]) == 0 and standard_error([0.0, 1.0]) == 0.5
