"""The rollout engine: prompts in, samples out, from the training model's own parameters.

    engine = Engine(model, EngineConfig(), seed=1, stop_ids={2})
    for sequence in engine.generate([Request(uid, prompt, samples=8)], Sampling()): ...

The only decoder of the project: evaluation, generation and GRPO use it. Ranks that hold parts of one model (tensor,
pipeline) run the same engine on the same requests and plan the same steps; data-parallel ranks, and context-parallel
ones, which have nothing to share while they generate, run engines of their own.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Many
from math import isnan
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_tools.mistake import UserMistake
from data_tools.progress import Stop, Stopped, never
from megatron_ext.layers import router_replay
from megatron_ext.layers.router_replay import Routers
from megatron_ext.rollout.blocks import BlockManager
from megatron_ext.rollout.cache import NewTokens
from megatron_ext.rollout.room import too_small
from megatron_ext.rollout.runner import Runner
from megatron_ext.rollout.sampler import NOTHING
from megatron_ext.rollout.scheduler import EngineStep, Scheduler
from megatron_ext.rollout.sequence import Answer, Prefix, Request, Sequence, completes, spans
from megatron_ext.rollout.settings import EngineConfig, Sampling

Detokenize = Callable[[list[int]], str]


class NoDistribution(UserMistake):
    """The model's logits are NaN or infinite, so there is no next token.

    The ranks of one replica raise it, not all.
    """

    of_some_ranks = True  # rank 0 may not know of it

    def __init__(self, uid: int, sample: int, position: int, prompt: str = "", model: str = "the model"):
        self.uid, self.sample, self.position = uid, sample, position
        where = f"{prompt or f'prompt {uid}'}, sample {sample}, new token {position + 1}"
        what = f"gives NaN or infinite logits for {where}"
        super().__init__(
            f"{model} {what}: its weights are damaged, or overflow in their dtype; look at what made them, or try "
            "dtype: float32"
        )

    def named(self, prompt: str, model: str) -> "NoDistribution":
        """Return the same mistake in words of the run: which prompt of its tasks, and whose weights."""
        return NoDistribution(self.uid, self.sample, self.position, prompt=prompt, model=model)


class Turns(Protocol):
    """Who answers the model where a turn of it ends.

    Ranks that plan the same steps are told the same, in one order.
    """

    def ask(self, sequence: Sequence) -> None:
        """Ask what is replied to a sample whose turn has ended."""

    def answers(self, wait: bool) -> list[tuple[Sequence, Answer]]:
        """Return what came since the last call. Wait a moment for it where nothing else is to be done (`wait`)."""


class _Nobody:
    """The turns of requests that never ask."""

    def ask(self, sequence: Sequence) -> None:
        raise ValueError("a request has turn ends, and `turns` is missing to answer it")

    def answers(self, wait: bool) -> list[tuple[Sequence, Answer]]:
        return []


def _no_text(tokens: list[int]) -> str:
    raise ValueError("stop strings and turn ends are texts, and `detokenize` is missing")


class Engine:
    """Decodes with a model's own parameters. `stop_ids` end a sample, or a turn of it, and belong to it.

    `detokenize` is needed for stop strings and turn ends. With `records_routing` samples keep which experts their
    tokens went to, of a model that was built for it (layers/router_replay.py); the host then waits once more a step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: EngineConfig,
        seed: int,
        stop_ids: Collection[int],
        detokenize: Detokenize | None = None,
        records_routing: bool = False,
    ):
        self.model, self.config, self.seed = model, config, seed
        self.stop_ids, self.detokenize = frozenset(stop_ids), detokenize or _no_text
        self.runner = Runner(model, config)
        self.routers = Routers.of(self.runner.model) if records_routing else None
        self.counts: Counter[str] = Counter()
        self._is_idle = False  # the last step had nothing to compute
        experts = parallel_state.get_expert_model_parallel_group()
        self._together = experts if experts.size() > 1 else None

    def generate(
        self, requests: Many[Request], sampling: Sampling, stop: Stop = never, turns: Turns | None = None
    ) -> Iterator[Sequence]:
        """Yield the samples as they end.

        `stop` is asked between steps; when it says so on this rank, `Stopped` is raised with the number of samples that
        ended. Counts of the work are added to `counts`. `turns` is needed where requests have turn ends.
        Raises UserMistake when one sample could not be held in the memory given, NoDistribution where logits are not
        finite.
        """
        turns = turns or _Nobody()
        blocks = self._blocks(requests, sampling)
        slots = 2 * self.config.max_batch if self.runner.cache.mixers else 0
        self.scheduler = Scheduler(self.config, blocks, slots)
        added = self.scheduler.add(requests, sampling.max_tokens)
        self.runner.cache.allocate(len(blocks.references), slots)
        was_training = self.model.training
        self.model.eval()
        if self.routers:
            self.routers.record()
        else:
            router_replay.steer(self.runner.model, None)
        prompts: dict[Prefix, torch.Tensor] = {}  # the logits after each held prompt
        ended = 0
        try:
            for sequence in added:
                if len(sequence.tokens) > sequence.prompt_length and self._ends_turn(sequence, sampling):
                    self._ask(sequence, turns)  # the recorded tokens end where its reply was waited for
            while self._any_has_work():
                if stop():
                    raise Stopped(ended, sum(len(request.numbers) for request in requests))
                for sequence in [*self._answered(sampling, turns), *self._step(sampling, prompts, turns)]:
                    ended += 1
                    yield sequence
        finally:
            self.counts["preemptions"] += self.scheduler.preemptions
            self.runner.free()
            self.model.train(was_training)

    @property
    def unfinished(self) -> list[Sequence]:
        """Samples under way: running, or waiting with tokens that they already have."""
        s = self.scheduler
        return [
            *s.running,
            *s.parked,
            *s.answered,
            *(waiting for waiting in s.waiting if len(waiting.tokens) > waiting.prompt_length),
        ]

    def abort(self, sequence: Sequence) -> None:
        """End a sample as it is; it is not among those that `generate` still gives."""
        self.scheduler.finish(sequence, "abort")

    def _blocks(self, requests: Many[Request], sampling: Sampling) -> BlockManager:
        """Return as many blocks as the memory holds, or as all samples can need.

        Every rank that plans the same steps has as many.
        """
        size, held = self.config.block_size, self._least(self.runner.cache.blocks_in(self.config.kv_gib))
        longest = max((len(request.prompt) for request in requests), default=0) + sampling.max_tokens
        needed = -(-longest // size) + 1
        if any(not request.prompt for request in requests):
            raise ValueError("a prompt without tokens has no last position to continue from")
        if needed > held:
            raise UserMistake(too_small(self.config, max(held, 0), needed))
        each = ((request, -(-(len(request.prompt) + sampling.max_tokens) // size) + 1) for request in requests)
        return BlockManager(min(held, sum((len(request.numbers) + 1) * blocks for request, blocks in each)), size)

    def _least(self, blocks: int) -> int:
        """Return the smallest number of the ranks that hold this model: stages have more or fewer attention layers."""
        parts = parallel_state.get_model_parallel_group()
        if parts.size() == 1:
            return blocks
        least = torch.tensor(blocks, device=self.runner.cache.target)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=parts)
        return int(least)

    def _any_has_work(self) -> bool:
        """Return whether a rank has work, of those that meet in each pass.

        With them this one is idle when all of them are: before, they would wait for it.
        """
        if self._together is None:
            return self.scheduler.has_work
        flags = torch.tensor([self.scheduler.has_work, not self._is_idle], device=self.runner.cache.target).int()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._together)
        has_work, busy = map(bool, flags.tolist())
        self._is_idle = not busy
        return has_work

    def _ask(self, sequence: Sequence, turns: Turns) -> None:
        """Let a sample wait for a reply to its turn."""
        self.scheduler.park(sequence)
        turns.ask(sequence)

    def _answered(self, sampling: Sampling, turns: Turns) -> list[Sequence]:
        """Let the samples that were answered go on. Return those that ended with it."""
        if not self.scheduler.parked:
            return []
        ended = []
        for sequence, answer in turns.answers(wait=self._is_idle):
            if sequence.finish:
                continue  # it was aborted in the meantime
            reason = self._hear(sequence, answer, sampling)
            if reason:
                self.scheduler.finish(sequence, reason)
                ended.append(sequence)
            else:
                self.scheduler.answer(sequence)
        return ended

    def _hear(self, sequence: Sequence, answer: Answer, sampling: Sampling) -> str:
        """Append a reply to the sample. Return why it ends, "" when it goes on."""
        if answer.note:
            sequence.note = answer.note
            return "abort"
        if answer.tokens is None or (not answer.tokens and self._ends(sequence, sampling)):
            return "stop"
        turns = sum(span.own for span in spans(sequence.logprobs))
        if answer.tokens and 0 < sampling.max_turns <= turns:
            return "turns"
        sequence.observe(answer.tokens[: sequence.limit - len(sequence.completion)])
        return "length" if len(sequence.completion) >= sequence.limit else ""

    def _step(self, sampling: Sampling, prompts: dict[Prefix, torch.Tensor], turns: Turns) -> list[Sequence]:
        """Compute and draw. Return the samples that ended."""
        step = self.scheduler.plan()
        self._is_idle = step.is_empty
        self.runner.cache.copy_blocks(step.copies)
        self.runner.cache.copy_states(step.states)
        begun = [sequence for sequence in step.begun if len(sequence.tokens) == sequence.prompt_length]
        rows = [prompts[sequence.prefix] for sequence in begun]
        logits = iter(self._compute(step))
        self._count(step)
        finished = self.scheduler.computed(step)
        rows += [next(logits) for _ in step.decodes]
        resumed = []
        for piece in step.pieces:
            if piece.owner in finished:
                prompts[piece.owner] = next(logits)
            elif isinstance(piece.owner, Sequence) and piece.stop == len(piece.owner.tokens):
                resumed.append(piece.owner)
                rows.append(next(logits))
        for prefix in [prefix for prefix in prompts if prefix not in self.scheduler.prefixes]:
            del prompts[prefix]
        return self._draw([*begun, *step.decodes, *resumed], rows, sampling, turns)

    def _compute(self, step: EngineStep) -> list[torch.Tensor]:
        """Return logits [V / t] after each decoded sample and each piece that is its owner's last.

        They are empty on all but the last stage of a pipeline.
        """
        documents = [NewTokens((s.tokens[-1],), s.cached, s.blocks, s.slot) for s in step.decodes]
        wanted = list(range(len(documents)))
        for piece in step.pieces:
            owner = piece.owner
            if piece.stop == len(owner.request.prompt if isinstance(owner, Prefix) else owner.tokens):
                wanted.append(len(documents))
            documents.append(NewTokens(piece.tokens, piece.start, owner.blocks, owner.slot))
        if documents:
            logits = list(self.runner.logits(documents, wanted))
            self._note_routing(step, documents)
            return logits
        if self._together is not None:
            self.runner.idle()
        return []

    def _note_routing(self, step: EngineStep, documents: list[NewTokens]) -> None:
        """Have each holder of blocks keep which experts its tokens went to, where that is recorded."""
        if not self.routers:
            return
        chosen, at = self.routers.recorded(sum(len(document.tokens) for document in documents)), 0
        for owner, document in zip([*step.decodes, *(piece.owner for piece in step.pieces)], documents):
            owner.note_routing(document.start, chosen[at : at + len(document.tokens)])
            at += len(document.tokens)

    def _count(self, step: EngineStep) -> None:
        """Count a step."""
        self.counts["steps"] += bool(step.tokens)
        self.counts["decoded"] += len(step.decodes)
        self.counts["prefilled"] += sum(len(piece.tokens) for piece in step.pieces)
        self.counts["running"] += len(self.scheduler.running) * bool(step.tokens)
        self.counts["most_blocks"] = max(self.counts["most_blocks"], self.scheduler.blocks.used)

    def _draw(
        self, sequences: list[Sequence], rows: list[torch.Tensor], sampling: Sampling, turns: Turns
    ) -> list[Sequence]:
        """Give each sample its next token. Return those that it ends."""
        if not sequences:
            return []
        noise = [0.0 if sampling.is_greedy else sequence.noise(self.seed) for sequence in sequences]
        drawn = self.runner.draw(rows, noise, sampling)
        columns = zip(sequences, *(part.tolist() for part in drawn))
        ended = []
        for sequence, token, logprob, model_logprob, margin in columns:
            if token == NOTHING:
                raise NoDistribution(sequence.prefix.request.uid, sequence.sample, len(sequence.completion))
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.model_logprobs.append(model_logprob)
            sequence.margins.append(margin)
            if self._ends_turn(sequence, sampling):
                self._ask(sequence, turns)
                continue
            reason = self._why_ended(sequence, sampling)
            if reason:
                self.scheduler.finish(sequence, reason)
                ended.append(sequence)
        return ended

    def _why_ended(self, sequence: Sequence, sampling: Sampling) -> str:
        """Return why a sample ends with its last token, "" when it goes on."""
        if self._ends(sequence, sampling):
            return "stop"
        return "length" if len(sequence.tokens) - sequence.prompt_length >= sequence.limit else ""

    def _ends(self, sequence: Sequence, sampling: Sampling) -> bool:
        """Return whether the model ended the sample, or one of its turns, with its last token."""
        return sequence.tokens[-1] in self.stop_ids or self._completes(sequence, sampling.stop_strings)

    def _ends_turn(self, sequence: Sequence, sampling: Sampling) -> bool:
        """Return whether the last token is one after which somebody may answer.

        It depends on the tokens alone: a sample that was recorded goes on with the same question.
        """
        ends = sequence.prefix.request.turn_ends
        if ends is None or isnan(sequence.logprobs[-1]):
            return False
        return self._ends(sequence, sampling) or self._completes(sequence, ends)

    def _completes(self, sequence: Sequence, texts: Many[str]) -> bool:
        """Return whether the last token completes one of the texts."""
        return completes(sequence.tokens, texts, self.detokenize, start=sequence.prompt_length)
