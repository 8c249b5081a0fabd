"""Rewards → advantages. NumPy, float64; a prompt's samples are one group.

A reward that is NaN is one that nobody could give: its sample has advantage 0, is not trained, and counts in no mean or
deviation. That is not the same as reward 0.
"""

import numpy as np

from megatron_ext.rl.settings import Advantage


def advantages(rewards: np.ndarray, groups: np.ndarray, config: Advantage) -> np.ndarray:
    """Return float64 [n], the advantages of samples with rewards [n].

    `groups` int64 [n] are the numbers of their prompts, from 0, in any order. mean: R - mean of the group.
    leave_one_out: R - mean of its others, which is n / (n - 1) as much. The deviation is that of the sample (n - 1),
    as in TRL and verl; where it cannot be (one sample, or `none`) nothing is divided.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    known = np.isfinite(rewards)
    count = np.bincount(groups, known)
    mean = _mean(rewards, groups, known, count)
    centred = np.where(known, rewards - mean[groups], 0.0)
    n = count[groups]
    if config.baseline == "leave_one_out":
        centred = centred * np.divide(n, n - 1, out=np.zeros_like(n), where=n > 1)
    if config.scale == "none":
        return centred
    if config.scale == "group":
        squares = np.bincount(groups, np.where(known, (rewards - mean[groups]) ** 2, 0.0))
        deviation = np.sqrt(squares / np.maximum(count - 1, 1))[groups]
    else:
        deviation = np.std(rewards[known], ddof=1) if known.sum() > 1 else 0.0
    return (
        centred / (deviation + config.epsilon)
        if config.epsilon
        else np.divide(
            centred, deviation, out=np.zeros_like(centred), where=np.broadcast_to(deviation, centred.shape) > 0
        )
    )


def _mean(rewards: np.ndarray, groups: np.ndarray, known: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return float64 [groups], the mean of each group's known rewards, 0 where there are none."""
    return np.bincount(groups, np.where(known, rewards, 0.0)) / np.maximum(count, 1)


def equal_groups(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return bool [groups]: all known rewards of the group are the same, or there are none."""
    rewards = np.asarray(rewards, dtype=np.float64)
    known = np.isfinite(rewards)
    highest = np.full(int(groups.max(initial=-1)) + 1, -np.inf)
    lowest = np.full_like(highest, np.inf)
    np.maximum.at(highest, groups[known], rewards[known])
    np.minimum.at(lowest, groups[known], rewards[known])
    return highest <= lowest


def overlong_penalty(lengths: np.ndarray, limit: int, cache: int) -> np.ndarray:
    """Return float64 [n] to add to the rewards of completions of `lengths` [n] tokens.

    It is 0 up to limit - cache tokens, then falls to -1 at `limit`, and stays -1 beyond (DAPO, arXiv 2503.14476, eq.
    13).
    """
    return -np.clip((np.asarray(lengths, dtype=np.float64) - (limit - cache)) / cache, 0.0, 1.0)
