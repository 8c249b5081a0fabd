"""Tells the attempts at each phase: when it was sent, how long it waited, how long its elements worked, and how they
ended.

The time that a job waits counts from when all that it needs was sealed, since no queue could have started it before.
"""

from collections import Counter
from dataclasses import dataclass, field

from jobs.artifacts.run_folder import FrozenPhase
from jobs.schema.pipeline import NEED_SEALS
from launchers.causes.states import PENDING, is_failed
from launchers.observe.gpu_hours import Span, spans
from launchers.observe.look import Look
from launchers.planning.ledger import Ledger

MESSAGES = 3  # of an attempt, the commonest that are shown
RUNNING, SEALED, KILLED = "running", "sealed", "killed"  # killed: it left no word


@dataclass(frozen=True)
class Waited:
    """One wait of one element, in seconds since the epoch: for the queue, or to be started again."""

    since: float
    until: float
    over: bool = True  # False: it still waits


@dataclass
class Attempt:
    """One attempt at a phase, with all lives of its elements; times in seconds since the epoch."""

    phase: str
    number: int  # of the submission
    elements: int  # that it was sent for
    sent: float | None = None  # None: the ledger does not tell
    spans: list[Span] = field(default_factory=list)
    waits: list[Waited] = field(default_factory=list)

    @property
    def ends(self) -> Counter[str]:
        """Return how many lives ended how."""
        return Counter(end_of(span) for span in self.spans)

    @property
    def messages(self) -> list[tuple[str, int]]:
        """Return the commonest last words of lives that did not seal, with their numbers."""
        said = [_last_words(span) for span in self.spans if end_of(span) not in (SEALED, RUNNING)]
        return Counter(filter(None, said)).most_common(MESSAGES)

    @property
    def first_start(self) -> float | None:
        """Return when the first of its lives began, None where none has."""
        return min((span.started for span in self.spans), default=None)

    @property
    def last_end(self) -> float | None:
        """Return when the last of its lives ended or, of one that still runs, the time of the look."""
        return max((span.ended for span in self.spans), default=None)

    @property
    def waited_s(self) -> float:
        """Return the longest wait of one of its elements for the queue, in seconds."""
        return max((wait.until - wait.since for wait in self.waits), default=0.0)

    @property
    def worked_s(self) -> float:
        """Return the seconds that its elements worked, added up."""
        return sum(span.seconds for span in self.spans)

    @property
    def lost_s(self) -> float:
        """Return how many of these seconds were not kept by a seal or a checkpoint."""
        return sum(span.lost_seconds for span in self.spans)

    @property
    def gpu_s(self) -> float:
        """Return the GPU-seconds of its lives."""
        return sum(span.used_s for span in self.spans)

    @property
    def gpu_lost_s(self) -> float:
        """Return the GPU-seconds that were not kept."""
        return sum(span.lost_s for span in self.spans)


def end_of(span: Span) -> str:
    """Return in one word how a life ended: the outcome's, or that it runs, or that it left no word."""
    if span.running:
        return RUNNING
    outcome = span.life.outcome if span.life is not None else None
    return outcome.state if outcome is not None else KILLED


def _last_words(span: Span) -> str:
    outcome = span.life.outcome if span.life is not None else None
    if outcome is None:
        return "left no word: killed, or its node was lost"
    return ": ".join(filter(None, [outcome.cause, outcome.message]))


def attempts_of(look: Look, now: float) -> dict[str, list[Attempt]]:
    """Return {phase: its attempts, oldest first} of the phases of the newest submission, under any key they had."""
    sent = {e["job"]: e["time"] for e in Ledger(look.run.ledger).events() if e["event"] == "job"}
    lives = {name: spans(look, name, now, without_gpus=True) for name in look.phases}
    return {name: _attempts(look, phase, lives, sent, now) for name, phase in look.phases.items()}


def _attempts(
    look: Look, phase: FrozenPhase, lives: dict[str, list[Span]], sent: dict[str, float], now: float
) -> list[Attempt]:
    """Return the attempts at one phase: of the ledger's jobs, and of lives that it does not tell of."""
    attempts: dict[int, Attempt] = {}
    sent_at: dict[tuple[int, int], float] = {}  # (attempt, element)
    for entry in look.entries:
        if entry.phase != phase.name:
            continue
        attempt = attempts.setdefault(entry.submission, Attempt(phase.name, entry.submission, elements=0))
        attempt.elements += len(entry.elements)
        if (at := sent.get(entry.job)) is not None:
            attempt.sent = at if attempt.sent is None else min(attempt.sent, at)
            sent_at |= {(entry.submission, i): at for i in entry.elements}
    seals = _Needs(look, phase, lives)
    before: Span | None = None
    for span in lives[phase.name]:
        life = span.life
        assert life is not None
        attempt = attempts.setdefault(life.attempt, Attempt(phase.name, life.attempt, elements=0))
        attempt.spans.append(span)
        last = before.life if before is not None else None
        if before is not None and last is not None and (last.element, last.attempt) == (life.element, life.attempt):
            attempt.waits.append(Waited(before.ended, max(before.ended, span.started)))
        elif (at := sent_at.get((life.attempt, life.element))) is not None:
            since = min(max(at, seals.met(life.element, span.started)), span.started)
            attempt.waits.append(Waited(since, span.started))
        before = span
    _add_what_waits(look, phase, attempts, sent_at, now)
    return [attempts[number] for number in sorted(attempts)]


def _add_what_waits(
    look: Look, phase: FrozenPhase, attempts: dict[int, Attempt], sent_at: dict[tuple[int, int], float], now: float
) -> None:
    """Add the waits of elements that are in the queue and were not started, if all that they need is sealed."""
    if any(
        type_ in NEED_SEALS and look.run.whole_seal(need, look.phases[need].key) is None
        for need, type_ in phase.needs.items()
    ):
        return
    seals = _Needs(look, phase, {})
    begun = {(n, span.life.element) for n, each in attempts.items() for span in each.spans if span.life is not None}
    for element in look.open_elements(phase):
        state, number = element.state(), element.entry.submission
        if state.state != PENDING or is_failed(state.state, state.reason):
            continue
        for index in element.indices:
            if (number, index) not in begun:
                since = max(sent_at.get((number, index), now), seals.met(index, now))
                attempts[number].waits.append(Waited(min(since, now), now, over=False))


class _Needs:
    """When all that a phase needs was there."""

    def __init__(self, look: Look, phase: FrozenPhase, lives: dict[str, list[Span]]):
        self._sealed: list[float] = []
        self._parts: list[dict[int, float]] = []
        for need, type_ in phase.needs.items():
            seal = look.run.whole_seal(need, look.phases[need].key)
            if type_ == "aftercorr":
                lives_of_need = [(span, span.life) for span in lives.get(need, ()) if span.sealed]
                self._parts.append({life.element: span.ended for span, life in lives_of_need if life is not None})
            elif seal is not None:
                self._sealed.append(seal.content.get("sealed_at", 0.0))
                # What was sealed again since was sealed before, too, once each of its attempts had ended.
                ends: dict[int, float] = {}
                for span in lives.get(need, ()):
                    if span.sealed and span.life is not None:
                        ends[span.life.attempt] = max(span.ended, ends.get(span.life.attempt, 0.0))
                self._sealed += ends.values()

    def met(self, element: int, before: float) -> float:
        """Return when the last need of an element was sealed, of those that were before a time; 0 where none was."""
        times = [*self._sealed, *(part[element] for part in self._parts if element in part)]
        return max((time for time in times if time <= before), default=0.0)
