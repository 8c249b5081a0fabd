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
from megatron_ext.weights.exchange import from_rank_zero

VOTE_EVERY = 16  # engine steps between two questions whether to stop, where ranks have to agree


class Prompts(Protocol):
    """The run's endless order of prompts."""

    def item(self, k: int) -> Any:
        """Return prompt number `k`, as the scorer wants it."""

    def tokens(self, item: Any) -> tuple[int, ...]:
        """Return the prompt as the model reads it."""

    def uid(self, item: Any) -> int:
        """Return what the noise of the prompt's samples is keyed by: another number each time the prompt comes."""

    def name(self, item: Any) -> str:
        """Return what a message calls it."""


class Scorer(Protocol):
    """Who judges completions, in processes of its own."""

    def submit(self, item: Any, completion: str, finish: str) -> Any:
        """Return a future of the verdict on a completion.

        Its result() has reward (float, or None where nobody can tell), parts and note; and `answer`, for majority
        votes, where its task can tell.
        """


class Together:
    """Whether to stop, with one answer for the ranks that plan the same steps of the engine."""

    def __init__(self, stop: Stop):
        self.stop, self.calls, self.told = stop, 0, False
        groups = (parallel_state.get_model_parallel_group(), parallel_state.get_expert_model_parallel_group())
        self.groups = [group for group in groups if group.size() > 1]

    def __call__(self) -> bool:
        self.calls += 1
        if self.groups and self.calls % VOTE_EVERY:
            return False
        self.told = self.stop()
        if self.groups:
            flag = torch.tensor([float(self.told)], device=device())
            for group in self.groups:
                dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
            self.told = bool(flag.item())
        return self.told


def everywhere(flag: bool) -> bool:
    """Return whether any rank says so."""
    box = torch.tensor([float(flag)], device=device())
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box.item())


class Collector:
    """Makes the samples of one step after the other. `seconds` and `counts` are of the step begun last."""

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
        """Prepare to sample from `engine`.

        `scorer` is needed where `Replica.speaks`. `spell(tokens, finish)` is the completion's text. `group` is how
        many samples a prompt has. `root` is the journal's folder, and tokens under way are written there every
        `flush_s` seconds. `identity` names what samples depend on besides the step. `turns` is for tasks that reply.
        `model` is what a message calls the model.
        """
        self.engine, self.prompts, self.spell = engine, prompts, spell
        self.sampling, self.group, self.root, self.identity, self.flush_s = sampling, group, root, identity, flush_s
        self.progress, self.turns, self.model = progress, turns, model
        self._together, self._flushed = Together(stop), time.monotonic()
        self.replica = Replica()
        self.scorer = scorer if self.replica.speaks else None
        if self.replica.speaks and scorer is None:
            raise ValueError("the rank that scores a replica's samples needs a scorer")
        self.left = set(from_rank_zero(journal.steps(root)))  # steps of which earlier attempts recorded something
        self.entries: dict[tuple[int, int], Entry] = {}
        self.journal: Journal | None = None
        self.step: int | None = None
        self.counts: Counter[str] = Counter()
        self.kv_use = 0.0  # largest share of the blocks of keys and values that was in use
        self.seconds: dict[str, float] = {}

    def begin(self, step: int) -> None:
        """Make samples for the update of `step` from now on, with what earlier attempts recorded of it."""
        self.step = step
        self.entries = {}
        if step in self.left:
            recorded = journal.gather(self.root, step, self.identity) if dist.get_rank() == 0 else None
            self.entries = from_rank_zero(recorded)
        self.journal = None
        if self.replica.speaks:
            self.journal = Journal(self.root, step, self.identity, f"rank_{dist.get_rank()}")
            self.journal.resume(self.entries)
        self.counts, self.kv_use, self.seconds = Counter(), 0.0, {}

    def collect(self, items: Many[int]) -> list[Sample]:
        """Return the samples of these prompts, by prompt and number, the same on every rank.

        Raises Stopped, on every rank, once any was asked to stop: what was drawn until then is recorded, and it says
        how many tokens of the step are.
        """
        started = time.perf_counter()
        samples, pending = [], []

        def ended(sample: Sample) -> None:
            samples.append(sample)
            if self.scorer is not None and sample.reward is None and not sample.note:
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
                    ended(_scored(_sample(k, number, prompt, entry), entry.score))
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
        self._spent("rollout", started)
        if everywhere(stopped):
            drawn = self._recorded()
            self.close()
            raise Stopped(drawn, len(items) * self.group * self.sampling.max_tokens, "token")
        return self._judged(samples, pending)

    def _finished(self, sequence: Sequence) -> Sample:
        """Return the sample that a sequence became, and record its end."""
        request, logprobs = sequence.prefix.request, self._comparable(sequence)
        k = self.numbers[request.uid]
        entry = Entry(sequence.completion, logprobs, sequence.finish)
        sample = _sample(k, sequence.sample, request.prompt, entry)
        unscorable: dict[str, Any] | None = None
        if sequence.note:
            unscorable = {"reward": None, "parts": {}, "note": sequence.note}
        if self.journal is not None:
            self.journal.record(sample.key, sequence.completion, logprobs, sequence.finish)
            if unscorable:
                self.journal.judge(sample.key, unscorable)
        return _scored(sample, unscorable)

    def _comparable(self, sequence: Sequence) -> list[float]:
        """Return the log-probs that training can be compared with: those without the filters."""
        return sequence.model_logprobs if self.sampling.is_filtered else sequence.logprobs

    def _between_steps(self) -> bool:
        """Record what is under way when it is time to, and return whether to stop."""
        now = time.monotonic()
        if self.journal is not None and now - self._flushed >= self.flush_s:
            self._record_unfinished()
        return self._together()

    def _record_unfinished(self) -> None:
        """Record the tokens of samples that are under way."""
        if self.journal is not None:
            for sequence in self.engine.unfinished:
                key = (self.numbers[sequence.prefix.request.uid], sequence.sample)
                self.journal.record(key, sequence.completion, self._comparable(sequence))
            self.journal.flush()
        self._flushed = time.monotonic()

    def _recorded(self) -> int:
        """Return how many tokens of this step are recorded, by all ranks, earlier attempts included."""
        new = torch.tensor([self.journal.recorded if self.journal else 0], device=device())
        dist.all_reduce(new)
        return sum(len(entry.tokens) for entry in self.entries.values()) + int(new)

    def _spent(self, name: str, started: float) -> None:
        """Count the seconds since `started` as those of `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _count(self, reused: int) -> None:
        """Add the engine's counts of one call, of which `reused` samples came from the journal."""
        counts, blocks = self.engine.counts, len(self.engine.scheduler.blocks.references)
        used = counts.pop("most_blocks", 0) / max(blocks, 1)  # each draw has another number of blocks
        self.kv_use = max(self.kv_use, used)
        self.counts.update(counts)
        self.counts["reused"] += reused
        counts.clear()

    def _judged(self, samples: list[Sample], pending: list[tuple[Sample, Any]]) -> list[Sample]:
        """Return all replicas' samples, with their rewards."""
        started = time.perf_counter()
        if self.journal is not None:
            for sample, future in pending:
                score = future.result()
                verdict = {"reward": score.reward, "parts": dict(score.parts), "note": score.note}
                verdict["answer"] = getattr(score, "answer", None)
                _scored(sample, verdict)
                self.journal.judge(sample.key, verdict)
            self.journal.flush()
        self._spent("reward", started)
        started = time.perf_counter()
        rewards = {s.key: (s.reward, s.parts, s.note, s.answer) for s in samples} if self.replica.speaks else None
        rewards = self.replica.from_speaker(rewards)
        for sample in samples:
            sample.reward, sample.parts, sample.note, sample.answer = rewards[sample.key]
        everyone = sorted(self.replica.gathered(samples), key=lambda s: s.key)
        self._spent("exchange", started)
        return everyone

    def close(self) -> None:
        """Close the journal's file."""
        if self.journal is not None:
            self.journal.close()


def _sample(item: int, number: int, prompt: Many[int], entry: Entry) -> Sample:
    """Return the sample that is recorded as `entry`, not judged yet."""
    return Sample(
        item,
        number,
        tuple(prompt),
        tokens=np.array(entry.tokens, dtype=np.int32),
        logprobs=np.array(entry.logprobs, dtype=np.float32),
        finish=entry.finish,
    )


def _scored(sample: Sample, score: dict[str, Any] | None) -> Sample:
    """Return the sample with what a scorer said; a reward that is no finite number is none."""
    if score is not None:
        reward = score["reward"]
        usable = isinstance(reward, (int, float)) and np.isfinite(reward)
        sample.reward = float(reward) if usable else None
        sample.parts, sample.note = score["parts"], score["note"] or ("" if usable else "no reward")
        sample.answer = score.get("answer")
    return sample
