"""Which replica draws which samples of a step. Pure Python.

The samples lie in a row, prompt after prompt, and each replica takes the next stretch of them. So samples of a prompt
lie together and share its cache, a prompt is computed twice only where a stretch ends within it, and of more replicas
than prompts each has work as long as there are samples. What is drawn does not depend on how it is dealt.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_ext.rollout.settings import EngineConfig

UNEVEN = 1.25  # times the mean: the most samples that a replica is given, however short they are
CLOSE = 0.01  # of the largest work: how near its least one the search comes
REMEMBERED = 1 << 16  # prompts whose lengths are known

Stretch = dict[int, list[int]]  # what a replica draws: prompt -> numbers of its samples


@dataclass(frozen=True)
class Group:
    """Represents the samples of prompt `item` that are to be drawn.

    `prompt` is the work of computing the prompt, once on each replica that has samples of it; `samples` that of each
    sample, by its number. The unit is the work of a new token.
    """

    item: int
    prompt: float
    samples: Mapping[int, float]


def most_samples(samples: int, replicas: int) -> int:
    """Return the most of so many samples that a replica draws."""
    return min(samples, -int(-UNEVEN * samples // replicas))


def most_prompts(samples: int, group: int) -> int:
    """Return the most prompts that so many samples, one after the other in groups of `group`, are of."""
    return min(samples, 1 - -(samples - 1) // group)


def idle(samples: int, replicas: int) -> int:
    """Return how many replicas have nothing to draw, where the samples of a step are fewer."""
    return max(0, replicas - samples)


def idle_notes(prompts: int, samples: int, replicas: int) -> list[str]:
    """Say how many they are, and what to do."""
    count = idle(prompts * samples, replicas)
    if not count:
        return []
    step = f"a step has prompts {prompts:,} x group {samples:,} = {prompts * samples:,} samples"
    remedy = "raise one of them, spread each copy of the model over more ranks, or take fewer ranks"
    return [f"warning: replicas with nothing to draw: {count:,} of {replicas:,}; {step}: {remedy}"]


def deal(groups: Sequence[Group], replicas: int) -> list[Stretch]:
    """Return what each replica draws of these groups: of all cuts into stretches one whose largest work is about the
    smallest. No replica is idle as long as there are samples.
    """
    row = [(group, number) for group in groups for number in sorted(group.samples)]
    works = [group.samples[number] for group, number in row]
    one = max((group.prompt + work for (group, _), work in zip(row, works)), default=0.0)
    low = max(one, sum(works) / replicas)
    high, step = low, one
    while (dealt := _filled(row, replicas, high)) is None:
        low, high, step = high, high + step, 2 * step
    while high - low > CLOSE * high:
        middle = (low + high) / 2
        better = _filled(row, replicas, middle)
        if better is None:
            low = middle
        else:
            high, dealt = middle, better
    return dealt


def _filled(row: Sequence[tuple[Group, int]], replicas: int, largest: float) -> list[Stretch] | None:
    """Return stretches of this row whose work is at most `largest` each; None where there is a sample too many."""
    most, at, dealt = most_samples(len(row), replicas), 0, []
    for replica in range(replicas):
        stretch: Stretch = {}
        left, others = len(row) - at, replicas - replica - 1
        end = at + min(most, max(left - others, min(left, 1)))  # every other replica finds a sample, too
        load = 0.0
        while at < end:
            group, number = row[at]
            load += group.samples[number] + (0.0 if group.item in stretch else group.prompt)
            if load > largest:
                break
            stretch.setdefault(group.item, []).append(number)
            at += 1
        dealt.append(stretch)
    return dealt if at == len(row) else None


def prompt_work(config: EngineConfig, tokens: int) -> float:
    """Return the work of so many tokens that are known: a pass holds a token of each of max_batch samples, or else
    token_budget of prompts.
    """
    return tokens * config.max_batch / config.token_budget


@dataclass
class Lengths:
    """Knows how long samples became, and so how long others of the same prompts will be, about.

    Ranks that are told the same expect the same.
    """

    unknown: float  # new tokens of a sample as long as nothing is known
    known: dict[str, tuple[int, int]] = field(default_factory=dict)  # prompt -> its samples and their tokens
    samples: int = 0
    tokens: int = 0

    def hear(self, prompt: str, lengths: Iterable[int]) -> None:
        """Hear how long samples of a prompt became. What was heard first is forgotten first."""
        lengths = list(lengths)
        if not lengths:
            return
        count, tokens = self.known.pop(prompt, (0, 0))
        self.known[prompt] = (count + len(lengths), tokens + sum(lengths))
        while len(self.known) > REMEMBERED:
            del self.known[next(iter(self.known))]
        self.samples += len(lengths)
        self.tokens += sum(lengths)

    def copy(self) -> "Lengths":
        """Return the same knowledge, to be added to."""
        return replace(self, known=dict(self.known))

    def expected(self, prompt: str, drawn: int = 0) -> float:
        """Return how many new tokens a sample of the prompt will have that has `drawn` already; 1 at least."""
        count, tokens = self.known.get(prompt, (self.samples, self.tokens))
        return max(1.0, (tokens / count if count else self.unknown) - drawn)
