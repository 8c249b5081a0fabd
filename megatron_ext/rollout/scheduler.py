"""Which tokens of which samples the next forward pass computes.

Continuous batching: a place that a finished sample leaves is filled at once. A pass holds one token of every running
sample and, up to the token budget, pieces of prompts. A prompt is computed once for all its samples; they share its
blocks, and the last, half-filled one is copied by who first writes into it. When blocks run out, the sample that came
last gives its own back and is computed again later from its recorded tokens.

A sample that waits for a reply is parked: it keeps its blocks (and its recurrent state), as long as nobody needs them,
and its place goes to another one. With the reply it goes on from the tokens that are cached.
"""

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_ext.rollout.blocks import BlockManager
from megatron_ext.rollout.sequence import Prefix, Recorded, Request, Sequence
from megatron_ext.rollout.settings import EngineConfig

LOOK_AHEAD = 2  # times the batch: how far down the queue a step looks for samples to begin


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a holder of blocks that are to be computed; its later ones wait for another pass."""

    owner: Prefix | Sequence
    tokens: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """The position after the last of these tokens."""
        return self.start + len(self.tokens)


@dataclass
class EngineStep:
    """One forward pass of the engine. `copies` of blocks and `states` of recurrent slots (from, to) come before it."""

    decodes: list[Sequence] = field(default_factory=list)  # running samples: their last token each
    pieces: list[Piece] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    states: list[tuple[int, int]] = field(default_factory=list)
    begun: list[Sequence] = field(default_factory=list)  # whose prompt's last logits are known: they need no pass

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute and nothing to begin."""
        return not (self.decodes or self.pieces or self.begun)

    @property
    def tokens(self) -> int:
        """The number of tokens that are computed."""
        return len(self.decodes) + sum(len(piece.tokens) for piece in self.pieces)


class Scheduler:
    """Takes requests and plans the steps of the engine.

    Everything here is a function of the requests and of the tokens that were drawn, so that ranks which hold parts of
    one model plan the same steps.
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager, slots: int = 0):
        self.config, self.blocks = config, blocks
        self.free_slots = list(range(slots - 1, -1, -1))  # of recurrent state; none for attention alone
        self.recurrent = slots > 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.parked: list[Sequence] = []  # until they are answered
        self.answered: deque[Sequence] = deque()  # until there is a place: they have blocks
        self.prefixes: list[Prefix] = []  # that are held: being computed, or with samples that have yet to begin
        self.arrivals = self.preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any sample has not ended."""
        return bool(self.waiting or self.running or self.parked or self.answered)

    def add(self, requests: Iterable[Request], max_tokens: int) -> list[Sequence]:
        """Queue the samples of `requests`, and return them in order."""
        added = []
        for request in requests:
            prefix = Prefix(request, len(request.numbers))
            for sample in request.numbers:
                limit = request.limits[sample] if request.limits else max_tokens
                sequence = Sequence(prefix, sample, limit, list(request.prompt), arrival=self.arrivals)
                if sample < len(request.recorded):
                    recorded = Recorded(*request.recorded[sample])
                    sequence.tokens += recorded.tokens
                    sequence.logprobs += recorded.logprobs
                    sequence.model_logprobs += recorded.model_logprobs
                    if recorded.routing is not None:
                        sequence.routes.add(0, recorded.routing)
                self.arrivals += 1
                added.append(sequence)
        self.waiting.extend(added)
        return added

    # -- planning ------------------------------------------------------------------------------------------------

    def plan(self) -> EngineStep:
        """Return the next step, which is empty only when there is no work."""
        step = EngineStep()
        before = self.preemptions
        while self.answered and len(self.running) < self.config.max_batch:
            self.running.append(self.answered.popleft())
        self._decode(step)
        self._add_own(step)
        for prefix in self.prefixes:
            self._add_piece(step, prefix, prefix.request.prompt)
        if self.preemptions == before:
            self._admit(step)
        while step.is_empty and self.prefixes:  # prompts that hold all blocks and none to begin with
            self._drop_prefix(self.prefixes[-1])
            self._admit(step)
        while step.is_empty and self.running and len(self._holders()) > 1:  # replies that have no room
            self.preempt(self._victim())
            self._add_own(step)
        return step

    def _add_own(self, step: EngineStep) -> None:
        """Add tokens of running samples that are not their last: after a loss of blocks, or a reply."""
        for sequence in self.running:
            if len(sequence.tokens) - sequence.cached > 1:
                self._add_piece(step, sequence, sequence.tokens)

    def _holders(self) -> list[Sequence]:
        """Return the samples that have blocks to lose."""
        return [*self.running, *self.answered, *(sequence for sequence in self.parked if sequence.blocks)]

    def _victim(self) -> Sequence:
        """Return who gives its blocks back: of those that do nothing with them now, else of all, the last to come."""
        parked = [sequence for sequence in self.parked if sequence.blocks]
        return max(parked or self._holders(), key=lambda sequence: sequence.arrival)

    def _decode(self, step: EngineStep) -> None:
        """Add the last token of each running sample that has a place for it."""
        for sequence in list(self.running):
            ready = sequence in self.running and len(sequence.tokens) - sequence.cached == 1
            if ready and self._make_room(sequence, step):
                self._write(step, sequence, sequence.cached)
                step.decodes.append(sequence)

    def _make_room(self, sequence: Sequence, step: EngineStep) -> bool:
        """Return whether the sample's next token has a place.

        That may be the place of a prompt held for later, or of the sample which came last. That may be this one.
        """
        while self.blocks.cost_of_write(sequence.blocks, sequence.cached) > self.blocks.free:
            if self.prefixes:
                self._drop_prefix(self.prefixes[-1])
                continue
            victim = self._victim()
            self.preempt(victim)
            if victim is sequence:
                return False
            step.decodes = [other for other in step.decodes if other is not victim]
        return True

    def _write(self, step: EngineStep, owner: Prefix | Sequence, position: int) -> None:
        """Have the owner's block of `position` be its own, by a copy before the step where it is shared."""
        if copy := self.blocks.make_writable(owner.blocks, position):
            step.copies.append(copy)

    def _add_piece(self, step: EngineStep, owner: Prefix | Sequence, tokens: Iterable[int]) -> None:
        """Add as much of what the owner has yet to compute as budget and blocks allow."""
        missing = tuple(tokens)[owner.cached :]
        size = self.blocks.size
        shared = self.blocks.cost_of_write(owner.blocks, owner.cached) if owner.cached < len(owner.blocks) * size else 0
        if not missing or shared > self.blocks.free:
            return
        held = len(owner.blocks) * size - owner.cached  # places in blocks that it has
        room = min(len(missing), self.config.token_budget - step.tokens, held + (self.blocks.free - shared) * size)
        for position in range(owner.cached, owner.cached + room):
            if position % size == 0 or position == owner.cached:
                self._write(step, owner, position)
        if room > 0:
            step.pieces.append(Piece(owner, missing[:room], owner.cached))

    def _admit(self, step: EngineStep) -> None:
        """Begin waiting samples whose prompt is computed, and compute the prompts of the next ones, in order."""
        seen: Prefix | None = None
        for sequence in list(itertools.islice(self.waiting, self.config.max_batch * LOOK_AHEAD)):
            prefix = sequence.prefix
            if prefix is not seen and prefix not in self.prefixes:
                if not self._hold(prefix):
                    return
                self._add_piece(step, prefix, prefix.request.prompt)
            seen = prefix
            if prefix.cached == len(prefix.request.prompt) and not self._begin(sequence, step):
                return

    def _hold(self, prefix: Prefix) -> bool:
        """Hold a prompt's blocks from now on, and return whether that is so.

        It is not where a prompt that is held could not be computed to its end, or where many samples wait.
        """
        promised = sum(self.blocks.needed(len(p.request.prompt)) - len(p.blocks) for p in self.prefixes)
        enough = self.blocks.needed(len(prefix.request.prompt)) + 1 <= self.blocks.free - promised
        if not enough or sum(p.waiting for p in self.prefixes) >= self.config.max_batch:
            return False
        if self.recurrent:
            if not self._has_slot():
                return False
            prefix.slot = self.free_slots.pop()
        self.prefixes.append(prefix)
        return True

    def _has_slot(self) -> bool:
        """Return whether a recurrent state has a place: a free one, or that of the parked sample which came last."""
        parked = [sequence for sequence in self.parked if sequence.slot is not None]
        if not self.free_slots and parked:
            self.preempt(max(parked, key=lambda sequence: sequence.arrival))
        return bool(self.free_slots)

    def _begin(self, sequence: Sequence, step: EngineStep) -> bool:
        """Let a sample share its prompt's blocks and state. Return whether it has a place."""
        if len(self.running) == self.config.max_batch or not self.blocks.free:
            return False
        if self.recurrent and not self._has_slot():
            return False
        prefix = sequence.prefix
        self.waiting.remove(sequence)
        sequence.blocks = self.blocks.share(prefix.blocks)
        sequence.cached = prefix.cached
        if prefix.slot is not None:  # the model is recurrent
            sequence.slot = self.free_slots.pop()
            step.states.append((prefix.slot, sequence.slot))
        self.running.append(sequence)
        step.begun.append(sequence)
        return True

    # -- what happened -------------------------------------------------------------------------------------------

    def computed(self, step: EngineStep) -> list[Prefix]:
        """Hear that the step ran: its tokens are cached. Return the prompts whose last logits are known now."""
        for sequence in step.decodes:
            sequence.cached += 1
        done = []
        for piece in step.pieces:
            piece.owner.cached = piece.stop
            if isinstance(piece.owner, Prefix) and piece.stop == len(piece.owner.request.prompt):
                done.append(piece.owner)
        for sequence in step.begun:
            self._release_prefix(sequence.prefix)
        return done

    def _release_prefix(self, prefix: Prefix) -> None:
        """Hear that one of a prompt's samples has begun; with the last, the prompt's own hold ends."""
        prefix.waiting -= 1
        if prefix.waiting == 0:
            self._drop_prefix(prefix)

    def _drop_prefix(self, prefix: Prefix) -> None:
        """Take a prompt's blocks and state."""
        if prefix in self.prefixes:
            self.prefixes.remove(prefix)
        self.blocks.give_back(prefix.blocks)
        prefix.cached = 0
        self._free_slot(prefix)

    def _free_slot(self, owner: Prefix | Sequence) -> None:
        """Take the owner's recurrent state from it, if it has one."""
        if owner.slot is not None:
            self.free_slots.append(owner.slot)
            owner.slot = None

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Free a sample's blocks; it is not run any more, whether it ran or waited."""
        sequence.finish = reason
        self._leave(sequence)
        self._forget(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take a sample out of the list it is in."""
        for held in (self.running, self.parked, self.answered):
            if sequence in held:
                held.remove(sequence)
                return
        self.waiting.remove(sequence)
        self._release_prefix(sequence.prefix)

    def preempt(self, sequence: Sequence) -> None:
        """Take a sample's blocks; it waits at the front, with the tokens it has, unless it waits for a reply."""
        self.preemptions += 1
        self._forget(sequence)
        if sequence not in self.parked:
            self._leave(sequence)
            self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        """Put a sample at the front of those that wait."""
        sequence.prefix.waiting += 1
        self.waiting.appendleft(sequence)

    def park(self, sequence: Sequence) -> None:
        """Do not run a sample until it was answered, whether it ran or waited."""
        self._leave(sequence)
        self.parked.append(sequence)

    def answer(self, sequence: Sequence) -> None:
        """Let a sample go on: its reply, if there is any, is among its tokens."""
        self.parked.remove(sequence)
        if sequence.blocks:
            self.answered.append(sequence)
        else:
            self._wait(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """Take a sample's blocks and state."""
        self.blocks.give_back(sequence.blocks)
        sequence.cached = 0
        self._free_slot(sequence)
