"""Sampled completions, what they are worth, and which of them an update trains. NumPy, no torch.

Shapes below: n samples, or of one sample the n tokens of its completion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_ext.rl.advantages import advantages, equal_groups, overlong_penalty
from megatron_ext.rl.settings import Advantage, Rewarding
from megatron_ext.rollout.sequence import Span, spans

Key = tuple[int, int]  # number of the prompt in the run, number of the sample
ELSEWHERE = np.empty(0, dtype=np.int32)  # tokens, or log-probs, that other ranks have


@dataclass
class Sample:
    """Completion `number` of prompt `item`, which is its number in the run's order of prompts.

    tokens int32 [n] and logprobs float32 [n] of the completion, the end token among them; a log-prob is NaN where the
    token is not the model's but a reply's. `finish` as the engine says it. `reward` is None where nobody could tell it.
    `answer` is what it answers, for majority votes, where its task can tell. `replica` made it, and has its tokens;
    other ranks know which `spans` of them are the model's own, and are brought those that they train (replica.py).
    `text` is what it says where its maker gave no tokens of the folder's tokenizer, else None, and `beside` what more
    its row says.
    `routing` int16 [m, r] is which experts the m tokens of prompt and completion that were computed went to, where that
    is recorded (layers/router_replay.py); `routed` is (m, r) on every rank.
    """

    item: int
    number: int
    prompt: tuple[int, ...]
    tokens: np.ndarray
    logprobs: np.ndarray
    finish: str
    reward: float | None = None
    parts: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    answer: str | None = None
    replica: int = 0
    spans: tuple[Span, ...] = ()
    text: str | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)
    routing: np.ndarray | None = None
    routed: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.routing is not None:
            self.routed = self.routing.shape[0], self.routing.shape[1]
        self.spans = self.spans or tuple(spans(self.logprobs))

    @property
    def length(self) -> int:
        """The number of tokens of the completion."""
        return self.spans[-1].stop if self.spans else 0

    @property
    def own_tokens(self) -> int:
        """The number of them that are the model's own."""
        return sum(span.stop - span.start for span in self.spans if span.own)

    @property
    def turns(self) -> int:
        """The number of the model's turns."""
        return sum(span.own for span in self.spans)

    @property
    def is_here(self) -> bool:
        """Whether this rank has the tokens and log-probs."""
        return len(self.tokens) == self.length

    def told(self) -> "Sample":
        """Return what every rank knows of it: all but the texts, which are long."""
        return replace(self, prompt=(), tokens=ELSEWHERE, logprobs=ELSEWHERE, routing=None)

    def sent(self) -> np.ndarray:
        """Return tokens, log-probs and routing as one int32 array, for `receive`."""
        routing = np.empty(0, np.int16) if self.routing is None else self.routing.ravel()
        even = np.pad(routing, (0, routing.size % 2))
        return np.concatenate([self.tokens, self.logprobs.view(np.int32), even.view(np.int32)])

    @property
    def sent_size(self) -> int:
        """The numbers of `sent`, which every rank knows."""
        return 2 * self.length + -(-self.routed[0] * self.routed[1] // 2)

    def receive(self, sent: np.ndarray) -> None:
        """Take what another rank's `sent` gave."""
        n, (rows, width) = self.length, self.routed
        self.tokens, self.logprobs = sent[:n], sent[n : 2 * n].view(np.float32)
        if rows:
            self.routing = sent[2 * n :].view(np.int16)[: rows * width].reshape(rows, width)

    @property
    def key(self) -> Key:
        """What the journal and the metrics know the sample by."""
        return self.item, self.number

    @property
    def own(self) -> np.ndarray:
        """bool [n]: the model's own tokens, which are those that may be trained."""
        return ~np.isnan(self.logprobs)

    @property
    def is_truncated(self) -> bool:
        """Whether the model did not end it by itself."""
        return self.finish != "stop"


def rewards_of(samples: Sequence[Sample], config: Rewarding, limit: int) -> np.ndarray:
    """Return float64 [n], NaN where the sample is not to be trained: unscorable, or truncated where those are masked.

    `limit` is the most tokens a completion may have.
    """
    rewards = np.array([np.nan if s.reward is None else s.reward for s in samples], dtype=np.float64)
    rewards[~np.isfinite(rewards)] = np.nan
    if config.overlong_tokens:
        rewards += overlong_penalty(np.array([s.length for s in samples]), limit, config.overlong_tokens)
    if config.mask_truncated:
        rewards[[s.is_truncated for s in samples]] = np.nan
    return rewards


def groups_of(samples: Sequence[Sample]) -> np.ndarray:
    """Return int64 [n], the samples' prompts counted from 0."""
    return np.unique([s.item for s in samples], return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True)
class SampleBatch:
    """What one update trains on: the samples of the prompts that are kept, in order, with one advantage each.

    `trained` bool [n]: the others, whose reward nobody knows or wants, count as samples and have no tokens in the
    loss.
    """

    samples: list[Sample]
    advantages: np.ndarray
    trained: np.ndarray


def kept_items(samples: Sequence[Sample], config: Advantage, rewarding: Rewarding, limit: int) -> set[int]:
    """Return the prompts that teach something; all of them where none is dropped."""
    if not samples:
        return set()
    groups = groups_of(samples)
    items = np.unique([s.item for s in samples])
    dropped = np.zeros(len(items), dtype=bool)
    if config.drop_equal_groups:
        dropped = equal_groups(rewards_of(samples, rewarding, limit), groups)
    return set(items[~dropped].tolist())


def batch_of(
    samples: Sequence[Sample], kept: set[int], config: Advantage, rewarding: Rewarding, limit: int
) -> SampleBatch:
    """Return the batch of the samples whose prompts are kept."""
    chosen = sorted((s for s in samples if s.item in kept), key=lambda s: s.key)
    if not chosen:
        return SampleBatch([], np.zeros(0), np.zeros(0, dtype=bool))
    rewards = rewards_of(chosen, rewarding, limit)
    return SampleBatch(chosen, advantages(rewards, groups_of(chosen), config), np.isfinite(rewards))


def deal(lengths: np.ndarray, ranks: int, row_tokens: int, unit: int = 1) -> list[list[list[int]]]:
    """Return for each rank its rows, each a list of places in `lengths` (tokens), as even as the longest first makes
    them.

    All ranks get as many rows, the fewest that hold at most `row_tokens` each (a longer document has a row of its
    own) and divide by `unit`. A row may be empty.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    most = max(row_tokens, int(lengths.max(initial=0)))
    each = max(unit, -(-int(lengths.sum()) // (ranks * row_tokens * unit)) * unit)
    while True:
        rows: list[list[int]] = [[] for _ in range(ranks * each)]
        loads = np.zeros(len(rows), dtype=np.int64)
        for place in order:
            row = int(np.argmin(loads))
            rows[row].append(place)
            loads[row] += lengths[place]
        if loads.max() <= most:
            break
        each += unit
    by_load = np.argsort(-loads, kind="stable").tolist()
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    for start in range(0, len(rows), ranks):  # back and forth, so that no rank always has the longer one
        turn = by_load[start : start + ranks]
        for rank, row in enumerate(turn if start // ranks % 2 == 0 else turn[::-1]):
            dealt[rank].append(sorted(rows[row]))
    return dealt
