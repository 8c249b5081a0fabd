"""What becomes of the samples that are not trained, and when a run that trains nothing has to end.

One step without a trained sample is usual: the groups may have got equal rewards. A whole run of them changed nothing
and is no success, and where every verifier fails it would be found after hours; so it is said, with the counts and the
commonest reason.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from data_tools.mistake import UserMistake
from data_tools.tasks.rewards import is_failure
from megatron_ext.rl.samples import Sample, SampleBatch
from megatron_ext.rl.settings import Rewarding

BROKEN_STEPS = 10  # in a row in which every verdict failed, after which the verifiers will not mend themselves
REASONS = 20  # told apart; the rest is counted together
REST = "others"
CATEGORIES = {"unscorable": "had no reward", "cut_off": "were cut off", "equal": "were in groups of equal rewards"}
_REMEDIES = {
    "unscorable": "mend the reward",
    "cut_off": "raise sampling.max_tokens, or set rewarding.mask_truncated: false",
    "equal": "take prompts that are neither too easy nor too hard, a larger group, or a finer reward",
}


class NothingTrained(UserMistake):
    """A run whose samples taught nothing."""


def count(drawn: Sequence[Sample], batch: SampleBatch, rewarding: Rewarding) -> Counter[str]:
    """Return how many of a step's samples were not trained, by category: a sample is in one."""
    trained = {sample.key for sample, good in zip(batch.samples, batch.trained) if good}
    counts: Counter[str] = Counter()
    for sample in drawn:
        if sample.key not in trained:
            cut = rewarding.mask_truncated and sample.is_truncated
            counts["unscorable" if sample.reward is None else "cut_off" if cut else "equal"] += 1
    return counts


def all_failed(drawn: Sequence[Sample]) -> bool:
    """Return whether every verdict of these samples failed: not one was scored, or could not be by its nature."""
    return bool(drawn) and all(is_failure(sample.reward, sample.note) for sample in drawn)


def add_reasons(reasons: dict[str, int], drawn: Sequence[Sample]) -> None:
    """Count the notes of samples without a reward in `reasons`, of which only so many are told apart."""
    for sample in drawn:
        if sample.reward is None:
            name = sample.note if sample.note in reasons or len(reasons) < REASONS else REST
            reasons[name] = reasons.get(name, 0) + 1


def told(counts: Mapping[str, int]) -> str:
    """Return "3 cut off, 5 unscorable" of counts by category; "" where all are 0."""
    words = {"unscorable": "unscorable", "cut_off": "cut off", "equal": "in groups of equal rewards"}
    return ", ".join(f"{counts[name]:,} {words[name]}" for name in words if counts.get(name))


def commonest(reasons: Mapping[str, int]) -> str:
    """Return the commonest of the reasons, and how often it was met."""
    reason, count = max(reasons.items(), key=lambda pair: (pair[0] != REST, pair[1]))
    return f"{reason} ({count:,} times)" if count > 1 else reason


def failed_verdicts(drawn: Sequence[Sample], where: str) -> UserMistake:
    """Return the mistake of samples whose every verdict failed."""
    reasons: dict[str, int] = {}
    add_reasons(reasons, drawn)
    return NothingTrained(
        f"{where}: no sample of {len(drawn):,} could be scored: {commonest(reasons)}; mend the reward. "
        "What was sampled is kept: the next attempt under these settings scores it anew"
    )


def nothing_trained(counts: Mapping[str, int], reasons: Mapping[str, int], samples: int, steps: int) -> UserMistake:
    """Return the mistake of a run without a trained sample, or with none whose advantage was not 0."""
    most = max(CATEGORIES, key=lambda name: counts.get(name, 0))
    if not counts.get(most):
        most, parts = "equal", ["all rewards of a group were equal"]
    else:
        parts = [f"{counts[name]:,} {what}" for name, what in CATEGORIES.items() if counts.get(name)]
    why = f", commonest reason: {commonest(reasons)}" if reasons and counts.get("unscorable") else ""
    return NothingTrained(
        f"nothing was trained in {steps:,} steps: of {samples:,} samples {', '.join(parts)}{why}. The weights are "
        f"those that it began with; {_REMEDIES[most]}"
    )
