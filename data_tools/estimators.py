"""What n samples of a prompt say of a model that may answer k times. Pure Python and NumPy."""

from collections import Counter
from functools import lru_cache
from itertools import combinations
from math import comb
from typing import Optional, Sequence

import numpy as np

MAJORITY_DRAWS = 1000  # subsets looked at where there are more

Vote = tuple[Optional[str], bool]  # what a sample answers, None where it answers nothing; whether that is right


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k samples is right, unbiased: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    if samples - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def majority_at_k(answers: Sequence[Optional[str]], right: Sequence[bool], k: int, seed: int = 0) -> float:
    """The chance that the most frequent of k answers is right; of equally frequent ones each is as likely.

    An answer that is None does not vote. Equal answers must be equally right. Over all subsets of k, or MAJORITY_DRAWS
    drawn with `seed` where there are more.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} of {len(answers)} samples")
    truth = {answer: bool(good) for answer, good in zip(answers, right)}
    return float(
        np.mean([_majority([answers[i] for i in places], truth) for places in _subsets(len(answers), k, seed)])
    )


@lru_cache(maxsize=64)
def _subsets(n: int, k: int, seed: int) -> list[tuple[int, ...]]:
    """Of n places, k each."""
    if comb(n, k) <= MAJORITY_DRAWS:
        return list(combinations(range(n), k))
    random = np.random.default_rng(seed)
    return [tuple(random.choice(n, k, replace=False).tolist()) for _ in range(MAJORITY_DRAWS)]


def at_k(prompts: Sequence[Sequence[Vote]]) -> dict[str, float]:
    """pass@k and, where anything was answered, maj@k, means over prompts, each with the votes of its samples: for k = 1,
    2, 4, … up to the fewest samples of a prompt. The order of a prompt's votes does not matter."""
    ordered = [sorted(votes, key=lambda vote: (str(vote[0]), vote[1])) for votes in prompts]
    answered = any(answer is not None for votes in ordered for answer, _ in votes)
    found: dict[str, float] = {}
    for k in (2**i for i in range(min(map(len, ordered), default=0).bit_length())):
        found[f"pass@{k}"] = float(
            np.mean([pass_at_k(len(votes), sum(right for _, right in votes), k) for votes in ordered])
        )
        if answered:
            means = [
                majority_at_k([answer for answer, _ in votes], [right for _, right in votes], k) for votes in ordered
            ]
            found[f"maj@{k}"] = float(np.mean(means))
    return found


def _majority(answers: Sequence[Optional[str]], truth: dict[Optional[str], bool]) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [answer for answer, count in votes.items() if count == most]
    return sum(truth[answer] for answer in tied) / len(tied)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 for fewer than two."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
