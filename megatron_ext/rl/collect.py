"""Rollouts of a step: prompts to samples with rewards, the same list on every rank, without their tokens.

Each data-parallel replica generates its share of the samples (rollout/dealing.py) with the parameters in training. What
is drawn is recorded at once (journal.py); a sample's reward is asked for when the sample ends, while others still run.
All ranks know lengths and rewards of all samples; their tokens stay where they were made until they are wanted.
"""

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import replace
from itertools import groupby
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
from megatron_ext.rl.samples import Key, Sample
from megatron_ext.rl.turns import Turns, ends_of
from megatron_ext.rollout.dealing import Group, Lengths, Stretch, deal, prompt_work
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
        self.recorded: dict[Key, Sample] = {}  # what earlier attempts recorded of the step
        self.lengths = Lengths(float(sampling.max_tokens))
        self.journal: Journal | None = None
        self.step: int | None = None
        self.counts: Counter[str] = Counter()
        self.kv_use = 0.0  # largest share of the blocks of keys and values that was in use
        self.seconds: dict[str, float] = {}

    def begin(self, step: int) -> None:
        """Make samples for the update of `step` from now on, with what earlier attempts recorded of it."""
        self.step = step
        self.recorded = self._left_of(step) if step in self.left else {}
        self.journal = None
        if self.replica.speaks:
            self.journal = Journal(self.root, step, self.identity, f"rank_{dist.get_rank()}")
            self.journal.resume(
                {key: sample.length for key, sample in self.recorded.items()},
                {key: sample.routed[0] for key, sample in self.recorded.items()},
            )
        self.counts, self.kv_use, self.seconds = Counter(), 0.0, {}

    def _left_of(self, step: int) -> dict[Key, Sample]:
        """Return what earlier attempts recorded of a step. The first replica has the tokens."""
        entries = journal.gather(self.root, step, self.identity) if dist.get_rank() == 0 else {}
        samples = [_scored(_sample(*key, (), entry), entry.score) for key, entry in entries.items()]
        told = from_rank_zero([sample.told() for sample in samples])
        if self.replica.number == 0:
            told = self.replica.from_speaker(samples)
        return {sample.key: sample for sample in told}

    def _dealt(self, items: Many[int], prompts: dict[int, tuple[int, ...]]) -> Stretch:
        """Return this replica's share of the samples of these prompts, with the tokens that it has of them already."""
        recorded = [self.recorded[key] for k in items for n in range(self.group) if (key := (k, n)) in self.recorded]
        ended = [sample.key for sample in recorded if sample.finish]
        lengths = self.lengths.copy() if ended else self.lengths
        for k, number in ended:
            lengths.hear(self._name(k), [self.recorded[k, number].length])
        left = {k: list(range(self.group)) for k in items}
        for k, number in ended:
            left[k].remove(number)
        dealt = deal([self._work(k, left[k], prompts[k], lengths) for k in items], self.replica.count)
        for place, (k, number) in enumerate(ended):  # they may have to be judged yet
            dealt[place % self.replica.count].setdefault(k, []).append(number)
        if recorded:
            wanted = [{(k, number) for k, numbers in of.items() for number in numbers} for of in dealt]
            self.replica.bring(recorded, [keys & self.recorded.keys() for keys in wanted])
        return dealt[self.replica.number]

    def _name(self, k: int) -> str:
        """Return what lengths are remembered by."""
        return self.prompts.name(self.prompts.item(k))

    def _work(self, k: int, numbers: Many[int], prompt: tuple[int, ...], lengths: Lengths) -> Group:
        """Return the work of the samples of a prompt that are to be drawn: to compute what they have, and to go on."""
        name, config, work = self._name(k), self.engine.config, dict[int, float]()
        for number in numbers:
            drawn = self.recorded[k, number].length if (k, number) in self.recorded else 0
            work[number] = prompt_work(config, drawn) + lengths.expected(name, drawn)
        return Group(k, prompt_work(config, len(prompt)), work)

    def collect(self, items: Many[int]) -> list[Sample]:
        """Return the samples of these prompts, by prompt and number, the same on every rank. Tokens and log-probs of
        those that other replicas made are not here: `bring` gets them.

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

        prompts = {k: self.prompts.tokens(self.prompts.item(k)) for k in items}
        share = self._dealt(items, prompts)
        wanted = {k: self.prompts.item(k) for k in share}
        self.numbers = {self.prompts.uid(item): k for k, item in wanted.items()}
        by_uid = {uid: wanted[k] for uid, k in self.numbers.items()}
        for sample in self._ended_before(share):
            ended(sample)
        requests = [self._request(wanted[k], prompts[k], own) for k, own in self._left_to_draw(share).items()]
        reused, count = len(samples), sum(map(len, share.values()))
        stopped = False
        replies = self.turns.of(by_uid, self.replica) if self.turns else None
        try:
            for sequence in self.engine.generate(requests, self.sampling, self._between_steps, replies):
                ended(self._finished(sequence))
                self.progress(len(samples), count, "samples")
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
        everyone = self._judged(samples, pending, prompts)
        for k, group in groupby(everyone, key=lambda sample: sample.item):
            self.lengths.hear(self._name(k), [sample.length for sample in group])
        return everyone

    def _ended_before(self, share: Stretch) -> list[Sample]:
        """Return those of a share that earlier attempts drew to their end, as this replica's."""
        samples = (self.recorded.get((k, number)) for k, numbers in share.items() for number in numbers)
        return [replace(sample, replica=self.replica.number) for sample in samples if sample and sample.finish]

    def _left_to_draw(self, share: Stretch) -> dict[int, dict[int, Recorded]]:
        """Return those that are to be drawn: prompt -> number -> what the sample has already."""
        left: dict[int, dict[int, Recorded]] = {}
        for k, numbers in share.items():
            for number in numbers:
                sample = self.recorded.get((k, number))
                if sample is None or not sample.finish:
                    left.setdefault(k, {})[number] = _as_recorded(sample)
        return left

    def _request(self, item: Any, prompt: tuple[int, ...], own: dict[int, Recorded]) -> Request:
        """Return what the engine is asked of a prompt: samples by number, each with what it has already."""
        recorded = tuple(own.get(number, Recorded()) for number in range(self.group)) if self.recorded else ()
        uid, ends = self.prompts.uid(item), ends_of(self.turns, item)
        return Request(uid, prompt, self.group, recorded, only=tuple(own), turn_ends=ends)

    def bring(self, samples: Many[Sample], trained: Many[set[Key]], written: bool) -> None:
        """Get the tokens and log-probs of collected samples to where they are needed: see Replica.wanted. Every rank
        takes part.
        """
        started = time.perf_counter()
        self.replica.bring(samples, self.replica.wanted(samples, trained, written))
        self._spent("exchange", started)

    def _finished(self, sequence: Sequence) -> Sample:
        """Return the sample that a sequence became, and record its end."""
        request, logprobs = sequence.prefix.request, self._comparable(sequence)
        k = self.numbers[request.uid]
        routing = sequence.routing
        entry = Entry(sequence.completion, logprobs, sequence.finish, routing)
        sample = _sample(k, sequence.sample, request.prompt, entry, self.replica.number)
        unscorable: dict[str, Any] | None = None
        if sequence.note:
            unscorable = {"reward": None, "parts": {}, "note": sequence.note}
        if self.journal is not None:
            self.journal.record(sample.key, sequence.completion, logprobs, sequence.finish, routing)
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
                logprobs = self._comparable(sequence)
                self.journal.record(key, sequence.completion, logprobs, routing=sequence.routing)
            self.journal.flush()
        self._flushed = time.monotonic()

    def _recorded(self) -> int:
        """Return how many tokens of this step are recorded, by all ranks, earlier attempts included."""
        new = torch.tensor([self.journal.recorded if self.journal else 0], device=device())
        dist.all_reduce(new)
        return sum(sample.length for sample in self.recorded.values()) + int(new)

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

    def _judged(
        self, samples: list[Sample], pending: list[tuple[Sample, Any]], prompts: dict[int, tuple[int, ...]]
    ) -> list[Sample]:
        """Return all replicas' samples, with their rewards, and with the tokens of these ones, which are this one's."""
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
        here = {sample.key: sample for sample in samples}
        told = self.replica.gathered([sample.told() for sample in samples])
        everyone = sorted((here.get(sample.key, sample) for sample in told), key=lambda s: s.key)
        for sample in everyone:
            sample.prompt = prompts[sample.item]
        self._spent("exchange", started)
        return everyone

    def close(self) -> None:
        """Close the journal's file."""
        if self.journal is not None:
            self.journal.close()


def _as_recorded(sample: Sample | None) -> Recorded:
    """Return what the engine goes on from; nothing where nothing is known of the sample."""
    if sample is None:
        return Recorded()
    tokens, logprobs = tuple(sample.tokens.tolist()), tuple(sample.logprobs.tolist())
    return Recorded(tokens, logprobs, logprobs, sample.routing)


def _sample(item: int, number: int, prompt: Many[int], entry: Entry, replica: int = 0) -> Sample:
    """Return the sample that is recorded as `entry`, not judged yet."""
    return Sample(
        item,
        number,
        tuple(prompt),
        tokens=np.array(entry.tokens, dtype=np.int32),
        logprobs=np.array(entry.logprobs, dtype=np.float32),
        finish=entry.finish,
        replica=replica,
        routing=entry.routing,
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
