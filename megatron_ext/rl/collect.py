"""Rollouts of a step: prompts to samples with rewards, the same list on every rank.

Each data-parallel replica generates its share of the prompts with the training model's own parameters. What is drawn is
recorded at once (journal.py); a sample's reward is asked for when the sample ends, while others still run.
"""

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_tools.progress import Progress, Stop, Stopped, silent
from megatron_ext.device import device
from megatron_ext.rl import journal
from megatron_ext.rl.journal import Entry, Journal
from megatron_ext.rl.replica import Replica
from megatron_ext.rl.samples import Sample
from megatron_ext.rl.turns import Turns, ends_of
from megatron_ext.rollout.engine import Engine, NoDistribution
from megatron_ext.rollout.sequence import Recorded, Request, Sequence
from megatron_ext.rollout.settings import Sampling
from megatron_ext.weights.checkpoint import from_rank_zero

VOTE_EVERY = 16  # engine steps between two questions whether to stop, where ranks have to agree


class Prompts(Protocol):
    """The run's endless order of prompts."""

    def item(self, k: int) -> Any:
        """Prompt number `k`, as the scorer wants it."""

    def tokens(self, item: Any) -> tuple[int, ...]: ...

    def uid(self, item: Any) -> int:
        """What the noise of its samples is keyed by: another one each time the prompt comes."""

    def name(self, item: Any) -> str:
        """Return what a message calls it."""


class Scorer(Protocol):
    def submit(self, item: Any, completion: str, finish: str) -> Any:
        """A future whose result() has reward (float, or None where nobody can tell), parts and note; and `answer`, for
        majority votes, where its task can tell."""


class Together:
    """Whether to stop, with one answer for the ranks that plan the same engine steps."""

    def __init__(self, stop: Stop):
        self.stop, self.calls, self.told = stop, 0, False
        groups = (parallel_state.get_model_parallel_group(), parallel_state.get_expert_model_parallel_group())
        self.groups = [group for group in groups if group.size() > 1]

    def __call__(self) -> bool:
        self.calls += 1
        if self.groups and self.calls % VOTE_EVERY:
            return False
        flag = torch.tensor([float(self.stop())], device=device()) if self.groups else None
        for group in self.groups:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        self.told = bool(flag.item()) if self.groups else self.stop()
        return self.told


def everywhere(flag: bool) -> bool:
    """Whether any rank says so."""
    box = torch.tensor([float(flag)], device=device())
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box.item())


class Collector:
    """Makes the samples of one step after the other. `seconds` and `counts` are of the last call of `collect`."""

    def __init__(
        self,
        engine: Engine,
        prompts: Prompts,
        scorer: Scorer | None,
        spell: Callable[[list[int], str], str],
        *,
        sampling: Sampling,
        group: int,
        root: Path,
        identity: str,
        flush_s: float,
        stop: Stop,
        progress: Progress = silent,
        turns: Turns | None = None,
        model: str = "the model",
    ):
        """`scorer` is needed where `Replica.speaks`. `spell(tokens, finish)` is the completion's text. `root` is the
        journal's folder; tokens under way are written every `flush_s` seconds. `turns`: for tasks that reply. `model`
        is what a message calls the model."""
        self.engine, self.prompts, self.scorer, self.spell = engine, prompts, scorer, spell
        self.sampling, self.group, self.root, self.identity, self.flush_s = sampling, group, root, identity, flush_s
        self.progress, self.turns, self.model = progress, turns, model
        self._together, self._flushed = Together(stop), time.monotonic()
        self.replica = Replica()
        self.left = set(from_rank_zero(journal.steps(root)))  # steps of which earlier attempts recorded something
        self.entries: dict[tuple[int, int], Entry] = {}
        self.journal: Journal | None = None
        self.step: int | None = None
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def begin(self, step: int) -> None:
        """Samples are for the update of `step` from now on."""
        self.step = step
        self.entries = {}
        if step in self.left:
            found = journal.gather(self.root, step, self.identity) if dist.get_rank() == 0 else None
            self.entries = from_rank_zero(found)
        self.journal = None
        if self.replica.speaks:
            self.journal = Journal(self.root, step, self.identity, f"rank_{dist.get_rank()}")
            self.journal.resume(self.entries)
        self.counts, self.seconds = Counter(), Counter()

    def collect(self, items: Many[int]) -> list[Sample]:
        """The samples of these prompts, by prompt and number. Stopped, on every rank, once any was asked to stop: what
        was drawn until then is recorded, and it says how many tokens of the step are."""
        started = time.perf_counter()
        samples, pending = [], []

        def ended(sample: Sample) -> None:
            samples.append(sample)
            if self.replica.speaks and sample.reward is None and not sample.note:
                text = self.spell(sample.tokens.tolist(), sample.finish)
                pending.append((sample, self.scorer.submit(wanted[sample.item], text, sample.finish)))

        wanted = {k: self.prompts.item(k) for k in self.replica.share(items)}
        prompts = {k: self.prompts.tokens(item) for k, item in wanted.items()}
        self.numbers = {self.prompts.uid(item): k for k, item in wanted.items()}
        by_uid = {uid: wanted[k] for uid, k in self.numbers.items()}
        requests = []
        for k, prompt in prompts.items():
            entries = [self.entries.get((k, number), Entry()) for number in range(self.group)]
            for number, entry in enumerate(entries):
                if entry.finish:
                    ended(_scored(_sample(k, number, prompt, entry.tokens, entry.logprobs, entry.finish), entry.score))
            only = tuple(number for number, entry in enumerate(entries) if not entry.finish)
            if only:
                recorded = tuple(Recorded(tuple(e.tokens), tuple(e.logprobs), tuple(e.logprobs)) for e in entries)
                uid, ends = self.prompts.uid(wanted[k]), ends_of(self.turns, wanted[k])
                requests.append(Request(uid, prompt, self.group, recorded, only=only, turn_ends=ends))
        reused = len(samples)
        stopped = False
        replies = self.turns.of(by_uid, self.replica) if self.turns else None
        try:
            for sequence in self.engine.generate(requests, self.sampling, self._between_steps, replies):
                ended(self._finished(sequence))
                self.progress(len(samples), len(wanted) * self.group, "samples")
        except Stopped:
            stopped = True
            self._record_unfinished()
        except NoDistribution as mistake:
            raise mistake.named(f"prompt {self.prompts.name(by_uid[mistake.uid])}", self.model) from None
        self._count(reused)
        self.seconds["rollout"] += time.perf_counter() - started
        if everywhere(stopped):
            recorded = self._recorded()
            self.close()
            raise Stopped(recorded, len(items) * self.group * self.sampling.max_tokens, "token")
        return self._judged(samples, pending)

    def _finished(self, sequence: Sequence) -> Sample:
        request, logprobs = sequence.prefix.request, self._comparable(sequence)
        k = self.numbers[request.uid]
        sample = _sample(k, sequence.sample, request.prompt, sequence.completion, logprobs, sequence.finish)
        unscorable = {"reward": None, "parts": {}, "note": sequence.note} if sequence.note else None
        if self.journal is not None:
            self.journal.record(sample.key, sequence.completion, logprobs, sequence.finish)
            if unscorable:
                self.journal.judge(sample.key, unscorable)
        return _scored(sample, unscorable)

    def _comparable(self, sequence: Sequence) -> list[float]:
        """Log-probs that training can be compared with: without the filters."""
        return sequence.model_logprobs if self.sampling.is_filtered else sequence.logprobs

    def _between_steps(self) -> bool:
        now = time.monotonic()
        if self.journal is not None and now - self._flushed >= self.flush_s:
            self._record_unfinished()
        return self._together()

    def _record_unfinished(self) -> None:
        if self.journal is not None:
            for sequence in self.engine.unfinished:
                key = (self.numbers[sequence.prefix.request.uid], sequence.sample)
                self.journal.record(key, sequence.completion, self._comparable(sequence))
            self.journal.flush()
        self._flushed = time.monotonic()

    def _recorded(self) -> int:
        """Tokens of this step, by all ranks, earlier attempts included."""
        new = torch.tensor([self.journal.recorded if self.journal else 0], device=device())
        dist.all_reduce(new)
        return sum(len(entry.tokens) for entry in self.entries.values()) + int(new)

    def _count(self, reused: int) -> None:
        found, blocks = self.engine.counts, len(self.engine.scheduler.blocks.references)
        used = found.pop("most_blocks", 0) / max(blocks, 1)  # each draw has another number of blocks
        self.counts["kv_use"] = max(self.counts["kv_use"], used)
        self.counts.update(found)
        self.counts["reused"] += reused
        found.clear()

    def _judged(self, samples: list[Sample], pending: list[tuple[Sample, Any]]) -> list[Sample]:
        """All replicas' samples, with their rewards."""
        started = time.perf_counter()
        for sample, future in pending:
            score = future.result()
            found = {"reward": score.reward, "parts": dict(score.parts), "note": score.note}
            found["answer"] = getattr(score, "answer", None)
            _scored(sample, found)
            self.journal.judge(sample.key, found)
        if self.journal is not None:
            self.journal.flush()
        self.seconds["reward"] += time.perf_counter() - started
        started = time.perf_counter()
        rewards = {s.key: (s.reward, s.parts, s.note, s.answer) for s in samples} if self.replica.speaks else None
        rewards = self.replica.from_speaker(rewards)
        for sample in samples:
            sample.reward, sample.parts, sample.note, sample.answer = rewards[sample.key]
        everyone = sorted(self.replica.gathered(samples), key=lambda s: s.key)
        self.seconds["exchange"] += time.perf_counter() - started
        return everyone

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()


def _sample(item: int, number: int, prompt: Many[int], tokens: list[int], logprobs: list[float], finish: str) -> Sample:
    found = np.array(tokens, dtype=np.int32), np.array(logprobs, dtype=np.float32)
    return Sample(item, number, tuple(prompt), *found, finish)


def _scored(sample: Sample, score: dict[str, Any] | None) -> Sample:
    """The sample with what a scorer said; a reward that is no finite number is none."""
    if score is not None:
        reward = score["reward"]
        usable = isinstance(reward, (int, float)) and np.isfinite(reward)
        sample.reward = float(reward) if usable else None
        sample.parts, sample.note = score["parts"], score["note"] or ("" if usable else "no reward")
        sample.answer = score.get("answer")
    return sample
