"""What n samples of a prompt say of a model that may answer k times. Pure Python and NumPy."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import exp, lgamma

import numpy as np

_NOTHING = 1e-20  # of a chance; the doubles of a result have 16 digits
Z = 1.959963984540054  # 95% of the standard normal distribution lie within so many deviations
RESAMPLES = 2000  # of a bootstrap
Vote = tuple[str | None, bool]  # what a sample answers, None where it answers nothing; whether that is right


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the chance that one of k samples is right, unbiased: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    if samples - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def majority_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Return the chance that the most frequent of k answers is right; of equally frequent ones each is as likely.

    The mean over all subsets of k, exactly and without listing them. An answer that is None does not vote. Where
    samples of one answer have several verdicts, the answer is right with their mean.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} of {len(answers)} samples")
    verdicts: dict[str, list[bool]] = {}
    for answer, good in zip(answers, right):
        if answer is not None:
            verdicts.setdefault(answer, []).append(bool(good))
    classes = Counter((len(rights), sum(rights) / len(rights)) for _, rights in sorted(verdicts.items()))
    return _won(tuple(sorted(classes.items())), len(answers), k)


@lru_cache(maxsize=2**14)
def _won(sizes: tuple[tuple[tuple[int, float], int], ...], n: int, k: int) -> float:
    """Return majority_at_k of n answers that are alike but for their words: prompts of few samples often are."""
    classes = dict(sizes)
    silent = n - sum(size * times for (size, _), times in classes.items())
    largest = max((size for size, _ in classes), default=0)
    total = sum(_won_by(votes, classes, silent, n=n, k=k) for votes in range(1, min(k, largest) + 1))
    return float(min(1.0, total / _drawn(n, k, n, k)[k]))


def _won_by(votes: int, classes: Mapping[tuple[int, float], int], silent: int, n: int, k: int) -> float:
    """Return the part of the subsets in which `votes` votes win, each weighted by how right its winners are.

    `classes` counts the answers of each (samples, verdict). The subsets are built answer by answer: `weights` [t, j] is
    of those with j samples so far and t answers that have `votes` votes, `rights` the same times the sum of their
    verdicts. Weights are those of a binomial draw of each sample with chance k/n, which are in the same proportion and
    not large; those below _NOTHING are left out.
    """
    weights, rights = _drawn(silent, k, n, k)[None], np.zeros((1, k + 1))
    for (size, verdict), times in sorted(classes.items()):
        chances = _drawn(size, k, n, k)
        fewer, equal = chances[: min(votes, size + 1)], chances[votes] if votes <= size else 0.0
        for _ in range(times):
            new = [_added(table, fewer, 1 if equal else 0) for table in (weights, rights)]
            if equal:
                new[0][1:, votes:] += equal * weights[:, : k + 1 - votes]
                new[1][1:, votes:] += equal * (rights + verdict * weights)[:, : k + 1 - votes]
            rows = np.flatnonzero(new[0].max(axis=1) > _NOTHING)
            if not rows.size:
                return 0.0
            weights, rights = (table[: rows[-1] + 1] for table in new)
    return float((rights[1:, k] / np.arange(1, len(rights))).sum())


def _added(table: np.ndarray, chances: np.ndarray, more: int) -> np.ndarray:
    """Return [t + more, j] after a class gave some of its samples: each number of them with its chance."""
    rows, columns = table.shape
    table_after = np.zeros((rows + more, columns))
    for given in np.flatnonzero(chances > _NOTHING):
        table_after[:rows, given:] += chances[given] * table[:, : columns - given]
    return table_after


@lru_cache(maxsize=4096)
def _drawn(size: int, most: int, n: int, k: int) -> np.ndarray:
    """Return float64 [most + 1]: the chance that 0, 1, … of `size` samples are drawn, each with chance k/n."""
    chances = np.zeros(most + 1)
    for given in range(min(size, most) + 1):
        if k == n:
            chances[given] = float(given == size)
        else:
            log = lgamma(size + 1) - lgamma(given + 1) - lgamma(size - given + 1)
            chances[given] = exp(log + given * np.log(k / n) + (size - given) * np.log1p(-k / n))
    return chances


def each_at_k(prompts: Sequence[Sequence[Vote]]) -> dict[str, list[float]]:
    """Return pass@k and, where anything was answered, maj@k, a value for each prompt, which has the votes of its
    samples: for k = 1, 2, 4, … up to the fewest samples of a prompt. The order of a prompt's votes does not matter."""
    ordered = [
        tuple(sorted(((answer, right) for answer, right in votes), key=lambda vote: (str(vote[0]), vote[1])))
        for votes in prompts
    ]
    answered = any(answer is not None for votes in ordered for answer, _ in votes)
    results: dict[str, list[float]] = {}
    for k in (2**i for i in range(min(map(len, ordered), default=0).bit_length())):
        results[f"pass@{k}"] = [pass_at_k(len(votes), sum(right for _, right in votes), k) for votes in ordered]
        if answered:
            results[f"maj@{k}"] = [_majority(votes, k) for votes in ordered]
    return results


@lru_cache(maxsize=2**16)
def _majority(votes: tuple[Vote, ...], k: int) -> float:
    """Return majority_at_k of sorted votes, which are asked about again for tables, intervals and files."""
    return majority_at_k([answer for answer, _ in votes], [right for _, right in votes], k)


def at_k(prompts: Sequence[Sequence[Vote]]) -> dict[str, float]:
    """Return the means over prompts of what `each_at_k` gives."""
    return {name: float(np.mean(values)) for name, values in each_at_k(prompts).items()}


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent values; None for fewer than two, which do not tell it."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def plus_or_minus(error: float | None, spell: Callable[[float], str]) -> str:
    """Return a standard error for people, behind what it is of."""
    return f" ± {'unknown' if error is None else spell(error)}"


def wilson(right: float, of: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share, of which `right` of `of` independent draws were seen.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    share, more = right / of, Z * Z / of
    middle = (share + more / 2) / (1 + more)
    half = Z * float(np.sqrt(share * (1 - share) / of + more / (4 * of))) / (1 + more)
    return (middle - half if right > 0 else 0.0), (middle + half if right < of else 1.0)


def bootstrap(values: Mapping[str, Sequence[float]], low: float | None = None) -> dict[str, tuple[float, float]]:
    """Return the 95% interval of the mean of each measure: percentiles of the means of RESAMPLES draws of prompts.

    `values` has as many values, one a prompt, for each measure; all are drawn together. They lie between `low` and 1,
    or anywhere where it is None. The order of the prompts does not matter, and the draws are always the same.

    Where all prompts have one value, no draw differs from another. Then the interval reaches as far as prompts could
    move the mean that none of these happened to be like: at most a share of Wilson's bound of 0 in n.
    """
    table = np.array(list(values.values()), dtype=np.float64).T  # [prompts, measures]
    table = table[np.lexsort(table.T)]
    prompts, generator = len(table), np.random.default_rng(0)
    means = np.empty((RESAMPLES, len(values)))
    for place in range(RESAMPLES):
        means[place] = np.bincount(generator.integers(prompts, size=prompts), minlength=prompts) @ table / prompts
    unseen = wilson(0, prompts)[1]
    intervals = {}
    for name, column, drawn in zip(values, table.T, means.T):
        value = float(column[0])
        if (column == value).all():
            down, up = (0.0, 0.0) if low is None else (value - low, 1 - value)
            intervals[name] = value - unseen * down, value + unseen * up
        else:
            first, last = np.quantile(drawn, (0.025, 0.975))
            intervals[name] = float(first), float(last)
    return intervals
