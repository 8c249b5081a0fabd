"""The Maker (rl/makers.py) over an engine that is not ours: one process, which records, scores and goes on after kills.

An engine is a Completer: it is asked for completions and yields them in any order. Each is recorded as it comes
(rl/journal.py), and the file is handed to the system every `record_s` seconds: a kill loses the completions since, and
those under way. They are asked for again with the same seed; none that is recorded is.
"""

import contextlib
import hashlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_tools.progress import Stopped
from data_tools.tasks.mix import Draw
from megatron_ext.rl import journal
from megatron_ext.rl.journal import Entry, Journal
from megatron_ext.rl.makers import Work
from megatron_ext.rl.samples import Key, Sample

_LOOK_S = 1.0  # between two questions whether to stop, at most, while completions come without a pause


class Ask(NamedTuple):
    """One completion that is wanted: sample `number` of prompt `item`, whose token ids are `prompt`.

    `seed` in [0, 2^53) is a function of run seed, prompt and number: the same whenever it is asked for.
    """

    item: int
    number: int
    draw: Draw
    prompt: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """What an engine made of an Ask: the end token is the last of `tokens` where one ended it.

    `logprobs` are the model's own, at temperature 1 and unfiltered. `finish` is stop, length or abort. `text` is for
    engines that give no tokens of the folder's tokenizer: `tokens` are as many as it counted, all -1, log-probs 0.
    `note` says why there is none that can be scored, `beside` what else its row says.
    """

    item: int
    number: int
    tokens: list[int]
    logprobs: list[float]
    finish: str
    text: str | None = None
    note: str = ""
    beside: dict[str, Any] = field(default_factory=dict)
    key: Key = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", (self.item, self.number))


class Completer(Protocol):
    """An engine, for one way of sampling."""

    def complete(self, asks: Sequence[Ask]) -> Generator[Completion | None, None, None]:
        """Yield the completion of each, as they end; None, often, where none has ended meanwhile.

        It is closed where the phase is asked to stop: what is under way is given up then.
        """


class JournaledMaker:
    """Makes the samples of one chunk after the other, by a Completer."""

    def __init__(self, work: Work, completer: Completer):
        self.work, self.completer = work, completer
        self.left = set(journal.steps(work.root))
        self.recorded: dict[Key, Entry] = {}
        self.journal: Journal | None = None
        self.stopping = False

    def begin(self, chunk: int) -> None:
        """Make samples of chunk number `chunk` from now on, with what earlier attempts recorded of it."""
        root, identity = self.work.root, self.work.identity
        self.recorded = journal.gather(root, chunk, identity) if chunk in self.left else {}
        self.recorded = {key: entry for key, entry in self.recorded.items() if entry.finish}
        self.journal = Journal(root, chunk, identity, "rank_0")
        self.journal.resume({key: len(entry.tokens) for key, entry in self.recorded.items()})

    def collect(self, items: range) -> list[Sample]:
        """Return the samples of these prompts, by prompt and number, with tokens and rewards. Raise Stopped as Maker
        says."""
        assert self.journal is not None
        wanted = [(item, number) for item in items for number in range(self.work.config.samples)]
        samples = {key: self._sample(key, self.recorded[key]) for key in wanted if key in self.recorded}
        pending = [(sample, self._submitted(sample)) for sample in samples.values()]
        asks = [self._ask(*key) for key in wanted if key not in samples]
        try:
            for sample in self._drawn(asks):
                samples[sample.key] = sample
                pending.append((sample, self._submitted(sample)))
            if self.stopping:
                drawn = sum(sample.length for sample in samples.values())
                raise Stopped(drawn, len(wanted) * self.work.config.sampling.max_tokens, "token")
            if missing := [key for key in wanted if key not in samples]:
                raise RuntimeError(f"{len(missing)} of {len(asks)} completions did not come: {missing[:3]}")
            for sample, future in pending:
                if future is not None:
                    self._judge(sample, future.result())
        finally:
            self.journal.close()
        return [samples[key] for key in wanted]

    def _drawn(self, asks: Sequence[Ask]) -> Iterator[Sample]:
        """Yield what the engine makes of these, as it comes, recorded. It ends early where the phase has to stop."""
        assert self.journal is not None
        flushed = looked = time.monotonic()
        with contextlib.closing(self.completer.complete(asks)) as stream:
            for completion in stream:
                if completion is not None:
                    yield self._recorded(completion)
                paid = completion is not None and completion.text is not None  # a server's, each asked for by itself
                if paid or time.monotonic() - flushed >= self.work.config.record_s:
                    self.journal.flush()
                    flushed = time.monotonic()
                if completion is None or time.monotonic() - looked >= _LOOK_S:  # all that has come is recorded first
                    looked, self.stopping = time.monotonic(), self.work.stop()
                if self.stopping:
                    return

    def _ask(self, item: int, number: int) -> Ask:
        prompts = self.work.prompts
        draw = prompts.item(item)
        seed = seed_of(self.work.config.seed, prompts.uid(draw), number)
        return Ask(item, number, draw, prompts.tokens(draw), seed)

    def _sample(self, key: Key, entry: Entry) -> Sample:
        """Return the sample that is recorded as `entry`."""
        item, number = key
        sample = Sample(
            item,
            number,
            self.work.prompts.tokens(self.work.prompts.item(item)),
            tokens=np.array(entry.tokens, dtype=np.int32),
            logprobs=np.array(entry.logprobs, dtype=np.float32),
            finish=entry.finish,
            text=entry.text,
            beside=entry.beside,
        )
        if entry.score is not None:
            _take(sample, entry.score)
        return sample

    def _recorded(self, completion: Completion) -> Sample:
        """Record a completion, and return it as a sample."""
        assert self.journal is not None
        entry = Entry(completion.tokens, completion.logprobs, completion.finish, text=completion.text)
        entry.beside = completion.beside
        self.journal.record(
            completion.key, entry.tokens, entry.logprobs, entry.finish, text=entry.text, beside=entry.beside
        )
        if completion.note:
            entry.score = {"reward": None, "parts": {}, "note": completion.note}
            self.journal.judge(completion.key, entry.score)
        return self._sample(completion.key, entry)

    def _submitted(self, sample: Sample) -> Any:
        """Return a future of the verdict on a sample, None where it has one."""
        if sample.reward is not None or sample.note:
            return None
        assert self.work.scorer is not None  # there where samples are made, since this process speaks
        texts = self.work.texts
        text = texts.spell(sample.tokens.tolist(), sample.finish) if sample.text is None else sample.text
        return self.work.scorer.submit(self.work.prompts.item(sample.item), text, sample.finish)

    def _judge(self, sample: Sample, score: Any) -> None:
        """Record a verdict, and give it to its sample."""
        assert self.journal is not None
        verdict = {"reward": score.reward, "parts": dict(score.parts), "note": score.note}
        verdict["answer"] = getattr(score, "answer", None)
        _take(sample, verdict)
        self.journal.judge(sample.key, verdict)


def _take(sample: Sample, score: dict[str, Any]) -> None:
    """Give a sample what a scorer said; a reward that is no finite number is none."""
    reward = score["reward"]
    usable = isinstance(reward, (int, float)) and np.isfinite(reward)
    sample.reward = float(reward) if usable else None
    sample.parts, sample.note = score["parts"], score["note"] or ("" if usable else "no reward")
    sample.answer = score.get("answer")


def seed_of(seed: int, uid: int, number: int) -> int:
    """Return the seed of sample `number` of the prompt `uid` in a run of `seed`: below 2^53, exact in any JSON."""
    digest = hashlib.sha256(f"{seed} {uid} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11
