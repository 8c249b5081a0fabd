"""Counts the hours of a phase: all lives of its elements, the GPU-hours they used, and what was lost.

Time counts from a worker's start to its end, not the allocation's. Two estimates: a worker that was killed left no
outcome, so its life is taken from its lease's time to what accounting says, else to the last write to its log; and of
one that did not stop by itself, checkpoints that a later attempt has pruned save nothing here: an upper bound.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_tools.base.indices import Indices
from jobs.artifacts.layout import durable_checkpoints_of
from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from launchers.causes.states import BEGUN_STATES
from launchers.causes.traces import keep_folder, lease_times
from launchers.observe.look import Look
from launchers.planning.ledger import JobEntry


@dataclass(frozen=True)
class Span:
    """One life of an element, in seconds since the epoch, and the GPUs that it held."""

    started: float
    ended: float
    gpus: int
    sealed: bool
    running: bool
    saved_at: tuple[float, ...]  # times of the durable checkpoints that are still there
    life: "Life | None" = None

    @property
    def seconds(self) -> float:
        """Return the seconds of the whole life."""
        return max(0.0, self.ended - self.started)

    @property
    def lost_seconds(self) -> float:
        """Return the seconds after the last durable checkpoint of this life; 0 of one that sealed or still runs."""
        if self.sealed or self.running:
            return 0.0
        kept = max((t for t in self.saved_at if self.started <= t <= self.ended), default=self.started)
        return max(0.0, self.ended - kept)

    @property
    def used_s(self) -> float:
        """Return the GPU-seconds of the whole life."""
        return self.seconds * self.gpus

    @property
    def lost_s(self) -> float:
        """Return the GPU-seconds after the last durable checkpoint of this life; 0 of one that sealed or still runs."""
        return self.lost_seconds * self.gpus


def gpu_hours(look: Look, phase: FrozenPhase) -> tuple[float | None, float | None]:
    """Return (used, lost) of all attempts at a phase in this run, also under other settings.

    (None, None) of a phase that never asked for GPUs.
    """
    asked = _asked(look, phase.name)
    if not any(attempt.gpus_per_node for attempt in asked.values()) and not phase.gpus_per_node:
        return None, None
    outcomes, gathered = look.brief(phase.name)
    now = time.time()
    lives = _lives(look, phase.name, asked, outcomes) if gathered else _all_lives(look, phase.name)
    all_spans = [_span(look, life, now) for life in lives if life.phase.gpus_per_node]
    gpus = {number: attempt.nodes * attempt.gpus_per_node for number, attempt in asked.items()}
    gathered = [some for some in gathered if gpus.get(some.attempt)]
    if not all_spans and not gathered and not phase.gpus_per_node:
        return None, None
    used_s = sum(span.used_s for span in all_spans)
    used_s += sum(some.seconds * gpus[some.attempt] for some in gathered)  # sealed: nothing is lost
    return used_s / 3600, sum(span.lost_s for span in all_spans) / 3600


def spans(look: Look, name: str, now: float | None = None, without_gpus: bool = False) -> list[Span]:
    """Return every life of every element of a phase in attempts that asked for GPUs, and (`without_gpus`) in the
    others; what still runs ends `now`.
    """
    now = time.time() if now is None else now
    return [_span(look, life, now) for life in _all_lives(look, name) if without_gpus or life.phase.gpus_per_node]


def _all_lives(look: Look, name: str) -> "list[Life]":
    """Return the lives of a phase's elements; gathered once."""
    if name not in look.lives:
        look.lives[name] = list(_lives(look, name, _asked(look, name), look.outcomes(name)))
    return look.lives[name]


@dataclass(frozen=True)
class Life:
    """One start of one element, as its lease and its worker's last word tell it."""

    phase: FrozenPhase  # as its attempt had it
    element: int
    attempt: int
    restart: int
    started: float
    outcome: Outcome | None  # its worker's last word
    requeued_at: float | None  # when the next life of this attempt began, if there was one
    entry: JobEntry | None  # the job of this attempt at this element


def _asked(look: Look, name: str) -> dict[int, FrozenPhase]:
    """Return {attempt: a phase as that submission had it}."""
    frozen = {number: look.frozen(number).get(name) for number in look.run.submissions()}
    return {number: phase for number, phase in frozen.items() if phase is not None}


def _lives(look: Look, name: str, asked: Mapping[int, FrozenPhase], told: Iterable[Outcome]) -> Iterator[Life]:
    """Yield the lives of a phase's elements that left a lease, or of which an outcome is `told`, in all attempts."""
    outcomes = {(o.element, o.attempt, o.restart): o for o in told if o.attempt in asked}
    leases = _lease_times(look.run, name, asked)
    jobs: dict[int, list[tuple[Indices, JobEntry]]] = {}  # attempt -> its jobs, the newest first
    for entry in reversed(look.entries):
        if entry.phase == name:
            jobs.setdefault(entry.submission, []).append((Indices.of(entry.elements), entry))
    lives = sorted({*leases, *outcomes})
    for life, following in zip(lives, [*lives[1:], None]):
        element, attempt, restart = life
        outcome = outcomes.get(life)
        yield Life(
            phase=asked[attempt],
            element=element,
            attempt=attempt,
            restart=restart,
            started=outcome.started if outcome is not None else leases[life],
            outcome=outcome,
            requeued_at=leases.get(following) if following is not None and following[:2] == life[:2] else None,
            entry=next((entry for carried, entry in jobs.get(attempt, ()) if element in carried), None),
        )


def _lease_times(run: RunFolder, name: str, asked: Mapping[int, FrozenPhase]) -> dict[tuple[int, int, int], float]:
    """Return {(element, attempt, restart): when its lease was taken} under the keys that the attempts had."""
    return {
        life: taken_at
        for key in {phase.key for phase in asked.values()}
        for life, taken_at in lease_times(run.path / name / key).items()
        if life[1] in asked and asked[life[1]].key == key
    }


def _span(look: Look, life: Life, now: float) -> Span:
    """Return from when to when a life lasted, and what of it was saved."""
    phase, outcome, entry = life.phase, life.outcome, life.entry
    task = look.states.get(entry.job, life.element) if entry is not None else None
    is_newest = outcome is None and life.requeued_at is None
    running = is_newest and task is not None and task.state in BEGUN_STATES
    ended = outcome.ended if outcome is not None else now if running else _end_of_the_killed(look, life)
    sealed = outcome is not None and outcome.state == "sealed"
    saved: tuple[float, ...] = ()
    if not sealed and not running:
        saved = checkpoint_times(keep_folder(look.run.artifact(phase).folder, phase, life.element))
        if outcome is not None and outcome.state == "stopped" and outcome.done:
            saved = (*saved, ended)  # at a durable checkpoint, whatever a later attempt has pruned
    return Span(
        started=life.started,
        ended=ended,
        gpus=phase.nodes * phase.gpus_per_node,
        sealed=sealed,
        running=running,
        saved_at=saved,
        life=life,
    )


def checkpoint_times(keep: Path) -> tuple[float, ...]:
    """Return when each checkpoint that is still there was made durable."""
    return tuple(path.stat().st_mtime for path in durable_checkpoints_of(keep))


def _end_of_the_killed(look: Look, life: Life) -> float:
    """Return an estimate of when a life ended that left no word; one log serves all lives of an attempt."""
    entry = life.entry
    told = look.accounting.get(entry.job, []) if entry is not None else []
    row = next((row for elements, row in told if life.element in elements), None)
    if row is not None and row.elapsed_s and life.requeued_at is None:
        return life.started + row.elapsed_s
    script = entry.scripted if entry is not None else life.attempt
    try:
        written = look.run.log_path(life.phase.name, script, life.element).stat().st_mtime
    except OSError:
        written = life.started
    return max(life.started, written if life.requeued_at is None else min(written, life.requeued_at))
