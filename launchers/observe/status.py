"""What became of each phase of a run: seals first, then what the back end says, then how attempts ended.

A seal is the only success. A job that a back end no longer lists, or lists as COMPLETED, without a seal is a failure
with a name, never a success. One look costs one squeue, and one sacct only when the queue no longer tells how an
unsealed element ended; without slurmdbd the files of the run have to say it.
"""

import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_tools.base.tables import read_tables
from data_tools.mistake import UserMistake
from jobs.artifacts.artifact import Artifact, Seal
from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.task import progress_path
from launchers.backends.choose import OtherCluster, backend_of, choices_of
from launchers.backends.contract import TaskState
from launchers.causes.evidence import exit_code_of
from launchers.causes.states import (
    ACTIVE_STATES,
    BEGUN_STATES,
    CANCELLED,
    COMPLETED,
    FAILED,
    NO_ANSWER,
    NO_SEAL,
    NOT_NEEDED,
    NOT_SUBMITTED,
    PENDING,
    RUNNING,
    UNKNOWN,
    is_active,
    is_failed,
)
from launchers.causes.traces import LeaseFile, lease_times, newest_leases
from launchers.planning.ledger import JobEntry, Ledger
from slurm.client import Slurm, SlurmError, SlurmUnavailable, configuration_of
from slurm.detect import NoDevCluster
from slurm.printed import AccountingRow, parse_indices


@dataclass
class PhaseStatus:
    phase: str
    state: str
    sealed: int
    elements: int
    job: str = ""
    reason: str = ""
    message: str = ""
    exit_code: int | None = None
    seconds: float | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    gpu_hours: float | None = None  # None: no attempt asked for GPUs
    gpu_hours_lost: float | None = None
    written_before: bool = False  # sealed before seals had a sum over themselves

    @property
    def active(self) -> bool:
        """Something goes on or will: a job that waits for ever on a failed one does not."""
        return is_active(self.state, self.reason)

    @property
    def failed(self) -> bool:
        """An element ended, or vanished, without its seal and nobody asked for that."""
        return is_failed(self.state, self.reason)


@dataclass
class RunStatus:
    run: str
    submission: int
    phases: list[PhaseStatus]
    notes: list[str] = field(default_factory=list)  # what could not be asked, and what the cluster refused
    where: str = ""  # which cluster it went to last, by which profile of which file
    unasked: str = ""  # why a cluster of its jobs told nothing
    may_answer: bool = False  # that cluster, later

    @property
    def finished(self) -> bool:
        """All that is needed is sealed."""
        return all(phase.state in (COMPLETED, NOT_NEEDED) for phase in self.phases)

    @property
    def active(self) -> bool:
        return any(phase.active for phase in self.phases)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"finished": self.finished, "active": self.active}


# -- one look -----------------------------------------------------------------------------------------------------


@dataclass
class Look:
    """All that one look at a run found, for status and why."""

    run: RunFolder
    number: int
    phases: dict[str, FrozenPhase]
    entries: list[JobEntry]
    states: dict[tuple[str, int], TaskState]  # by job and element: what the back end still lists
    accounting: dict[tuple[str, int], AccountingRow] = field(default_factory=dict)
    slurms: dict[str, Slurm] = field(default_factory=dict)  # job -> the cluster it went to
    notes: list[str] = field(default_factory=list)  # what could not be asked
    unasked: list[UserMistake] = field(default_factory=list)  # why clusters told nothing
    _elements: "dict[str, dict[int, Element]]" = field(default_factory=dict)
    _outcomes: dict[str, list[Outcome]] = field(default_factory=dict)

    def of_phase(self, phase: FrozenPhase) -> "dict[int, Element]":
        """The newest job of each element of a phase that was ever submitted under this key."""
        if phase.name not in self._elements:
            self._elements[phase.name] = self._read_elements(phase)
        # accounting is asked after the elements were read, for those that need it
        return (
            {
                i: replace(element, accounting=self.accounting.get((element.entry.job, i)))
                for i, element in self._elements[phase.name].items()
            }
            if self.accounting
            else self._elements[phase.name]
        )

    def seal(self, phase: FrozenPhase) -> Seal | None:
        """A phase's seal, unless it is of an earlier submission than a job of the phase that goes on: that one decides."""
        seal = self.run.seal(phase.name, phase.key)
        if seal is None or any(
            element.entry.submission > seal.submission
            and element.task is not None
            and element.task.state in ACTIVE_STATES
            for element in self.of_phase(phase).values()
        ):
            return None
        return seal

    def not_needed(self, phase: FrozenPhase) -> str:
        """Why a phase never has to run, "" if it may."""
        return self.run.not_needed(self.phases, phase.name)

    def outcomes(self, name: str) -> list[Outcome]:
        """How all attempts at a phase ended, oldest first; read once."""
        if name not in self._outcomes:
            self._outcomes[name] = self.run.outcomes(name)
        return self._outcomes[name]

    def _read_elements(self, phase: FrozenPhase) -> "dict[int, Element]":
        newest = {
            i: entry
            for entry in self.entries
            if (entry.phase, entry.key) == (phase.name, phase.key)
            for i in entry.elements
        }
        if not newest:
            return {}
        outcomes = {}
        for outcome in self.outcomes(phase.name):
            outcomes[outcome.element, outcome.attempt] = outcome
        leases = newest_leases(self.run.artifact(phase).folder)
        found = {}
        for i, entry in sorted(newest.items()):
            outcome = outcomes.get((i, entry.submission))
            lease = leases.get((i, entry.submission))
            if outcome is not None and lease is not None and lease.restart > outcome.restart:
                outcome = None  # it tells of the life before a requeue
            found[i] = Element(i, entry, self.states.get((entry.job, i)), outcome, None, lease)
        return found


@dataclass(frozen=True)
class Element:
    """One element of a phase, as its newest job left it."""

    index: int
    entry: JobEntry
    task: TaskState | None  # None: the back end does not know it (any more)
    outcome: Outcome | None  # None: its newest life has not said how it ended
    accounting: AccountingRow | None
    lease: LeaseFile | None

    def state(self) -> TaskState:
        """One word and reason for an element that is not sealed. Never COMPLETED: only a seal says that."""
        job = self.entry.job
        if self.task is not None:
            if self.task.state == COMPLETED:
                return TaskState(job, self.index, FAILED, NO_SEAL, self.task.exit_code)
            if self.task.exit_code is None and self.accounting is not None:
                return TaskState(job, self.index, self.task.state, self.task.reason, exit_code_of(self.accounting))
            return self.task
        row = self.accounting
        if row is not None and row.state not in ACTIVE_STATES:
            if row.state == COMPLETED:
                return TaskState(job, self.index, FAILED, NO_SEAL, row.exit_code)
            return TaskState(job, self.index, row.state, "so says accounting", exit_code_of(row))
        if self.outcome is not None and self.outcome.state != "sealed":
            return TaskState(job, self.index, FAILED, "", self.outcome.exit_code)
        return TaskState(job, self.index, UNKNOWN, "neither a seal nor the queue knows of it")


def look_at(run: RunFolder) -> Look:
    """Ask each cluster's queue once, and its accounting at most once, for all jobs of the run.

    A cluster that cannot be asked, or is not the one of this machine, leaves what the files of the run tell.
    """
    number = run.newest_submission()
    ledger = Ledger(run.ledger)
    copied = ledger.copied()
    entries = [
        entry
        for entry in ledger.jobs()
        if entry.scripted not in copied or run.whole_seal(entry.phase, entry.key) is not None
    ]
    look = Look(run, number, run.frozen(number), entries, {})
    submissions = [event for event in ledger.events() if event["event"] == "submission"]
    on_slurm = {event["submission"] for event in submissions if event["backend"] == "slurm"}
    mine = [entry for entry in entries if entry.scripted in on_slurm]
    asked: set[str] = set()
    for choice in choices_of(run):
        try:
            backend = backend_of(run, choice)
            slurm: Slurm | None = getattr(backend, "slurm", None)
            cluster = configuration_of(slurm.env) if slurm is not None else backend.name
            if cluster in asked:  # `auto` and `slurm` of two submissions may be one cluster
                continue
            tasks = backend.states(entries)
        except (OtherCluster, SlurmUnavailable, SlurmError) as error:
            gone = {event["submission"] for event in submissions if event["choice"] == choice}
            _leave_open(look, error, [entry for entry in mine if entry.scripted in gone])
            continue
        asked.add(cluster)
        for task in tasks:
            look.states[task.job, task.index] = task
        if slurm is not None:
            look.slurms |= {entry.job: slurm for entry in mine}
            look.accounting |= _accounting(look, slurm, {entry.job for entry in mine})
    return look


def _leave_open(look: Look, error: Exception, entries: list[JobEntry]) -> None:
    """Say of these jobs that their cluster told nothing."""
    mistake = error if isinstance(error, UserMistake) else SlurmUnavailable(str(error))
    look.unasked.append(mistake)
    reason = "its cluster is not this one" if isinstance(error, OtherCluster) else "its cluster does not answer"
    for entry in entries:
        for index in entry.elements:
            look.states[entry.job, index] = TaskState(entry.job, index, NO_ANSWER, reason)


def _accounting(look: Look, slurm: Slurm, jobs: set[str]) -> dict[tuple[str, int], AccountingRow]:
    """What slurmdbd says of unsealed elements whose end neither the queue nor their worker tells."""
    wanted = set()
    for phase in look.phases.values():
        if look.seal(phase) is not None:
            continue
        sealed = sealed_elements(look.run.artifact(phase))
        for element in look.of_phase(phase).values():
            told = element.outcome is not None or (element.task is not None and element.task.state in ACTIVE_STATES)
            if element.entry.job in jobs and element.index not in sealed and not told:
                wanted.add(element.entry.job)
    if not wanted:
        return {}
    try:
        rows = slurm.accounting(sorted(wanted))
    except SlurmError as error:  # slurmdbd is down: the report is poorer, not absent
        look.notes.append(f"accounting was not asked: {error.message}")
        return {}
    entries = {entry.job: entry for entry in look.entries}
    found = {}
    for row in rows or []:
        job, _, tasks = row.job_id.partition("_")
        if row.name != entries[job].name:  # a controller that lost its last seconds gave the id to another job
            continue
        for task in parse_indices(tasks.strip("[]")) if tasks else [None]:
            found |= {(job, i): row for i in entries[job].elements_of(task)}
    return found


def run_status(run: RunFolder) -> RunStatus:
    """The state of every phase of the newest submission."""
    look = look_at(run)
    ledger = Ledger(run.ledger)
    status = RunStatus(
        str(run.path),
        look.number,
        [_phase_status(look, phase) for phase in look.phases.values()],
        list(look.notes),
        where_of(ledger.backend(look.number)),
    )
    if look.unasked:
        status.unasked = look.unasked[0].problems[0].message
        status.may_answer = not any(isinstance(one, (OtherCluster, NoDevCluster)) for one in look.unasked)
        status.notes += [f"{one}; what is told is from the files of the run" for one in look.unasked]
    if not status.finished and (given_up := ledger.given_up()):
        status.notes.append(given_up)
    if before := [phase.phase for phase in status.phases if phase.written_before]:
        status.notes.append(
            f"no sum: written before, so that nobody can tell whether it was altered: the seal of {', '.join(before)}"
        )
    return status


def where_of(submission: dict[str, Any]) -> str:
    """Which cluster a submission went to, by which profile and which file; "" of one that did not write it down."""
    if "profile" not in submission:
        return ""
    place = f"cluster {submission['cluster_name']}" if submission["backend"] == "slurm" else "this machine"
    return f"{place}, profile {submission['profile']}" + (
        f" ({submission['profile_file']})" if submission["profile_file"] else ", made from its own partitions"
    )


def sealed_elements(artifact: Artifact) -> set[int]:
    """Elements with a seal of their own, by one listing of the folder."""
    try:
        names = os.listdir(artifact.folder / "seals")
    except FileNotFoundError:
        return set()
    return {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()}


def open_elements(look: Look, phase: FrozenPhase) -> dict[int, Element]:
    """Elements that were submitted and are not sealed; those whose sealed task still leaves count as sealed."""
    artifact = look.run.artifact(phase)
    if look.seal(phase) is not None:
        return {}
    sealed = sealed_elements(artifact) if artifact.fans_in else set()
    return {
        i: element
        for i, element in look.of_phase(phase).items()
        if i not in sealed or (element.task is not None and element.task.state in ACTIVE_STATES)
    }


def _phase_status(look: Look, phase: FrozenPhase) -> PhaseStatus:
    artifact = look.run.artifact(phase)
    used, lost = gpu_hours(look, phase)
    seal = look.seal(phase)
    if seal is not None:
        began = min(
            (o.started for o in look.outcomes(phase.name) if o.attempt == seal.content["submission"]),
            default=seal.content["started_at"],
        )
        return PhaseStatus(
            phase.name,
            COMPLETED,
            phase.elements,
            phase.elements,
            seal.content["job"],
            seconds=max(0.0, seal.content["sealed_at"] - began),  # two hosts' clocks, for eyes only
            facts=seal.facts,
            folder=str(seal.folder),
            tables=read_tables(artifact.folder),
            gpu_hours=used,
            gpu_hours_lost=lost,
            written_before=not seal.has_sum,
        )
    status = PhaseStatus(
        phase.name,
        NOT_SUBMITTED,
        len(sealed_elements(artifact)),
        phase.elements,
        folder=str(artifact.folder),
        gpu_hours=used,
        gpu_hours_lost=lost,
    )
    elements = look.of_phase(phase)
    if not_needed := look.not_needed(phase):
        status.state, status.reason = NOT_NEEDED, not_needed
    if not elements or not_needed:
        return status
    open_ = open_elements(look, phase)
    if not open_ and look.seal(phase) is not None:
        return _phase_status(look, phase)  # it was sealed since we looked
    tasks = {i: element.state() for i, element in open_.items()}
    worst = _worst(list(tasks.values()))
    newest = max(elements.values(), key=lambda element: element.entry.submission).entry
    status.job = worst.job or newest.job
    status.state, status.reason, status.exit_code = worst.state, worst.reason, worst.exit_code
    if worst.index in open_:
        outcome = open_[worst.index].outcome
    else:  # all elements are sealed: what the fan-in said, such as which element's seal is torn
        failed = [
            element.outcome for element in elements.values() if element.outcome and element.outcome.state == "mistake"
        ]
        outcome = max(failed, key=lambda found: (found.attempt, found.restart), default=None)
    if outcome is not None and outcome.state != "sealed" and not status.active:
        status.message, status.exit_code = outcome.message, outcome.exit_code
    status.progress = _progress(artifact.folder, phase, [i for i, task in tasks.items() if task.state == RUNNING])
    outcomes = [element.outcome for element in elements.values() if element.outcome is not None]
    status.seconds = max(0.0, max(o.ended for o in outcomes) - min(o.started for o in outcomes)) if outcomes else None
    return status


def _worst(open_tasks: list[TaskState]) -> TaskState:
    """The element to speak for the phase: what goes on first, else a failure, then what waits or was cancelled."""
    order = {FAILED: 0, UNKNOWN: 1, RUNNING: 3, PENDING: 4, CANCELLED: 5}
    if not open_tasks:
        return TaskState("", -1, FAILED, "all elements are sealed, their fan-in is not; submit again")
    going_on = [task for task in open_tasks if is_active(task.state, task.reason)]
    return min(going_on or open_tasks, key=lambda task: order.get(task.state, 2))


def _progress(folder: Path, phase: FrozenPhase, running: list[int]) -> dict[str, Any]:
    """Progress of the running elements added up; the note is that of the first."""
    total: Counter = Counter()
    out: dict[str, Any] = {}
    for index in running:
        try:
            value = json.loads(progress_path(keep_folder(folder, phase, index), index).read_text())
        except (OSError, ValueError):
            continue
        total.update(done=value["done"], total=value["total"])
        out = {"unit": value["unit"], "note": out.get("note") or value["note"]}
    return {**out, **total} if out else {}


def keep_folder(folder: Path, phase: FrozenPhase, index: int) -> Path:
    """Where an element keeps what survives attempts."""
    return folder if phase.elements == 1 else folder / "elements" / f"{index:04d}"


# -- GPU-hours ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """One life of an element on its GPUs, in seconds since the epoch."""

    started: float
    ended: float
    gpus: int
    sealed: bool
    running: bool
    saved_at: tuple[float, ...]  # times of the durable checkpoints that are still there

    @property
    def used_s(self) -> float:
        return max(0.0, self.ended - self.started) * self.gpus

    @property
    def lost_s(self) -> float:
        """GPU-seconds after the last durable checkpoint of this life; nothing of one that sealed or still runs."""
        if self.sealed or self.running:
            return 0.0
        kept = max((t for t in self.saved_at if self.started <= t <= self.ended), default=self.started)
        return max(0.0, self.ended - kept) * self.gpus


def gpu_hours(look: Look, phase: FrozenPhase) -> tuple[float | None, float | None]:
    """(used, lost) of all attempts at a phase in this run, also under other settings; (None, None) without GPUs.

    Time counts from a worker's start to its end, not the allocation's. Two estimates: a worker that was killed left no
    outcome, so its life is taken from its lease's time to what accounting says, else to the last write to its log; and
    of one that did not stop by itself, checkpoints that a later attempt has pruned save nothing here: an upper bound.
    """
    all_spans = spans(look, phase.name)
    if not any(span.gpus for span in all_spans) and not phase.gpus_per_node:
        return None, None
    return sum(span.used_s for span in all_spans) / 3600, sum(span.lost_s for span in all_spans) / 3600


def spans(look: Look, name: str, now: float | None = None) -> list[Span]:
    """Every life of every element of a phase that asked for GPUs."""
    run, found = look.run, []
    frozen = {number: phases[name] for number in run.submissions() if name in (phases := run.frozen(number))}
    asked = {number: phase for number, phase in frozen.items() if phase.gpus_per_node}
    if not asked:
        return []
    outcomes = {(o.element, o.attempt, o.restart): o for o in look.outcomes(name) if o.attempt in asked}
    leases: dict[tuple[int, int, int], float] = {}
    for key in {phase.key for phase in asked.values()}:
        leases |= {
            life: taken
            for life, taken in lease_times(run.path / name / key).items()
            if life[1] in asked and asked[life[1]].key == key
        }
    entries = {(i, entry.submission): entry for entry in look.entries if entry.phase == name for i in entry.elements}
    lives = sorted({*leases, *outcomes})
    for life, following in zip(lives, [*lives[1:], None]):
        element, attempt, _ = life
        phase, outcome, entry = asked[attempt], outcomes.get(life), entries.get((element, attempt))
        requeued_at = leases.get(following) if following is not None and following[:2] == life[:2] else None
        task = look.states.get((entry.job, element)) if entry else None
        newest = outcome is None and requeued_at is None
        running = newest and task is not None and task.state in BEGUN_STATES
        started = outcome.started if outcome else leases[life]
        if outcome is not None:
            ended = outcome.ended
        elif running:
            ended = time.time() if now is None else now
        else:
            ended = _end_of_the_killed(look, name, life, entry, started, requeued_at)
        sealed = outcome is not None and outcome.state == "sealed"
        saved: tuple[float, ...] = ()
        if not sealed and not running:
            saved = checkpoint_times(keep_folder(run.path / name / phase.key, phase, element))
            if outcome is not None and outcome.state == "stopped" and outcome.done:
                saved = (*saved, ended)  # at a durable checkpoint, whatever a later attempt has pruned
        found.append(Span(started, ended, phase.nodes * phase.gpus_per_node, sealed, running, saved))
    return found


def checkpoint_times(keep: Path) -> tuple[float, ...]:
    """When each checkpoint that is still there was made durable."""
    if not os.path.isdir(f"{keep}/checkpoints"):
        return ()
    return tuple(path.stat().st_mtime for path in keep.glob("checkpoints/step_*/manifest.json"))


def _end_of_the_killed(
    look: Look, name: str, life: tuple[int, int, int], entry: JobEntry | None, started: float, requeued_at: float | None
) -> float:
    """An estimate of when a life ended that left no word; one log serves all lives of an attempt."""
    element, attempt, _ = life
    row = look.accounting.get((entry.job, element)) if entry else None
    if row is not None and row.elapsed_s and requeued_at is None:
        return started + row.elapsed_s
    try:
        written = look.run.log_path(name, entry.scripted if entry else attempt, element).stat().st_mtime
    except OSError:
        written = started
    return max(started, written if requeued_at is None else min(written, requeued_at))


def format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}m{rest:02d}s"
