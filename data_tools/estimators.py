"""What n samples of a prompt say of a model that may answer k times. Pure Python and NumPy."""

from collections import Counter
from typing import Optional, Sequence

import numpy as np

MAJORITY_DRAWS = 1000  # subsets looked at where k answers are fewer than there are


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k samples is right, unbiased: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    if samples - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def majority_at_k(answers: Sequence[Optional[str]], right: Sequence[bool], k: int, seed: int = 0) -> float:
    """The chance that the most frequent of k answers is right; of equally frequent ones each is as likely.

    An answer that is None does not vote. Equal answers must be equally right. With fewer than all, over subsets drawn
    with `seed`.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} of {len(answers)} samples")
    truth = {answer: bool(good) for answer, good in zip(answers, right)}
    if k == len(answers):
        return _majority(answers, truth)
    random = np.random.default_rng(seed)
    drawn = (random.choice(len(answers), k, replace=False) for _ in range(MAJORITY_DRAWS))
    return float(np.mean([_majority([answers[i] for i in places], truth) for places in drawn]))


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
