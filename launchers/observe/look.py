"""Looks once at a run: at its seals, at what its clusters say, and at how attempts ended; for status and why.

A seal is the only success. A job that a back end no longer lists, or lists as COMPLETED, without a seal is a failure
with a name, never a success. One look costs one squeue, and one sacct only when the queue no longer tells how an
unsealed element ended; without slurmdbd the files of the run have to say it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.artifacts.seal import Seal
from launchers.backends.choose import OtherCluster, backend_of, choices_of
from launchers.backends.contract import TaskState
from launchers.causes.evidence import exit_code_of
from launchers.causes.states import ACTIVE_STATES, COMPLETED, FAILED, NO_ANSWER, NO_SEAL, UNKNOWN
from launchers.causes.traces import lease_times
from launchers.planning.ledger import JobEntry, Ledger
from slurm.client import Slurm, SlurmError, SlurmUnavailable, configuration_of
from slurm.printed import AccountingRow, parse_indices

# -- elements -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)  # a run may have a million
class Element:
    """One element of a phase, as its newest job left it."""

    index: int
    entry: JobEntry
    task: TaskState | None  # None: the back end does not know it (any more)
    outcome: Outcome | None  # None: its newest life has not said how it ended
    accounting: AccountingRow | None = None

    @property
    def is_active(self) -> bool:
        """Return whether the back end lists it as waiting, running or leaving."""
        return self.task is not None and self.task.state in ACTIVE_STATES

    def state(self) -> TaskState:
        """Return one word and reason for an element that is not sealed. Never COMPLETED: only a seal says that."""
        job = self.entry.job
        if self.task is not None:
            if self.task.state == COMPLETED:
                return TaskState(job, self.index, FAILED, NO_SEAL, exit_code=self.task.exit_code)
            if self.task.exit_code is None and self.accounting is not None:
                return replace(self.task, exit_code=exit_code_of(self.accounting))
            return self.task
        row = self.accounting
        if row is not None and row.state not in ACTIVE_STATES:
            if row.state == COMPLETED:
                return TaskState(job, self.index, FAILED, NO_SEAL, exit_code=row.exit_code)
            return TaskState(job, self.index, row.state, "so says accounting", exit_code=exit_code_of(row))
        if self.outcome is not None and self.outcome.state != "sealed":
            return TaskState(job, self.index, FAILED, exit_code=self.outcome.exit_code)
        return TaskState(job, self.index, UNKNOWN, "neither a seal nor the queue knows of it")


# -- the look -----------------------------------------------------------------------------------------------------


@dataclass
class Look:
    """All that one look at a run found."""

    run: RunFolder
    number: int  # the newest submission
    phases: dict[str, FrozenPhase]  # of that submission
    entries: list[JobEntry]
    states: dict[tuple[str, int], TaskState]  # by job and element: what the back end still lists
    accounting: dict[tuple[str, int], AccountingRow] = field(default_factory=dict)
    slurms: dict[str, Slurm] = field(default_factory=dict)  # job -> the cluster it went to
    notes: list[str] = field(default_factory=list)  # what could not be asked
    unasked: list[UserMistake] = field(default_factory=list)  # why clusters told nothing
    lives: dict[str, list[Any]] = field(default_factory=dict)  # of phases: what gpu_hours.py found of them
    _elements: dict[str, dict[int, Element]] = field(default_factory=dict)
    _outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    _frozen: dict[int, dict[str, FrozenPhase]] = field(default_factory=dict)

    def elements(self, phase: FrozenPhase) -> dict[int, Element]:
        """Return the elements of a phase that were ever submitted under its key, each with its newest job."""
        if phase.name not in self._elements:
            self._elements[phase.name] = {element.index: element for element in self._read_elements(phase)}
        # accounting is asked after the elements were read, for those that need it
        return (
            {
                i: replace(element, accounting=self.accounting.get((element.entry.job, i)))
                for i, element in self._elements[phase.name].items()
            }
            if self.accounting
            else self._elements[phase.name]
        )

    def open_elements(self, phase: FrozenPhase) -> dict[int, Element]:
        """Return the elements that were submitted and are not sealed, or whose task has still to leave."""
        if self.seal(phase) is not None:
            return {}
        artifact = self.run.artifact(phase)
        sealed = artifact.sealed_elements() if artifact.fans_in else set()
        return {i: element for i, element in self.elements(phase).items() if i not in sealed or element.is_active}

    def seal(self, phase: FrozenPhase) -> Seal | None:
        """Return a phase's seal; None while a job of a later submission than the seal's goes on: that one decides."""
        seal = self.run.seal(phase.name, phase.key)
        if seal is None or any(
            element.entry.submission > seal.submission and element.is_active
            for element in self.elements(phase).values()
        ):
            return None
        return seal

    def not_needed(self, phase: FrozenPhase) -> str:
        """Return why a phase never has to run, "" if it may."""
        return self.run.not_needed(self.phases, phase.name)

    def frozen(self, number: int) -> dict[str, FrozenPhase]:
        """Return the phases as a submission froze them; read once."""
        if number not in self._frozen:
            self._frozen[number] = self.run.frozen(number)
        return self._frozen[number]

    def outcomes(self, name: str) -> list[Outcome]:
        """Return how all attempts at a phase ended, oldest first; read once."""
        if name not in self._outcomes:
            self._outcomes[name] = self.run.outcomes(name)
        return self._outcomes[name]

    def _read_elements(self, phase: FrozenPhase) -> Iterator[Element]:
        """Yield what `elements` returns, without what accounting says."""
        newest: dict[int, JobEntry] = {}
        for entry in reversed(self.entries):
            if len(newest) == phase.elements:  # jobs of before carried them all once more
                break
            if (entry.phase, entry.key) == (phase.name, phase.key):
                newest = dict.fromkeys(entry.elements, entry) | newest
        if not newest:
            return
        outcomes = {(outcome.element, outcome.attempt): outcome for outcome in self.outcomes(phase.name)}
        leases = sorted(lease_times(self.run.artifact(phase).folder))
        restarts = {(element, attempt): restart for element, attempt, restart in leases}  # the newest of each attempt
        for i, entry in sorted(newest.items()):
            outcome = outcomes.get((i, entry.submission))
            if outcome is not None and restarts.get((i, entry.submission), 0) > outcome.restart:
                outcome = None  # it tells of the life before a requeue
            yield Element(i, entry, self.states.get((entry.job, i)), outcome)


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
    look = Look(run, number, phases=run.frozen(number), entries=entries, states={})
    asked: set[str] = set()
    for choice in choices_of(run):
        try:
            _ask(look, choice, asked)
        except (OtherCluster, SlurmUnavailable, SlurmError) as error:
            _leave_open(look, choice, error)
    look.notes += _going_on_besides(look)
    return look


def _going_on_besides(look: Look) -> list[str]:
    """Return which jobs go on of phases that the newest submission does not have: a plan without them leaves them."""
    going_on: dict[str, list[str]] = {}
    for entry in look.entries:
        states = [look.states.get((entry.job, index)) for index in entry.elements]
        if entry.phase in look.phases or not any(task and task.state in ACTIVE_STATES for task in states):
            continue
        seal = look.run.whole_seal(entry.phase, entry.key)
        if seal is None or seal.submission < entry.submission:  # a later seal: it only has to leave
            going_on.setdefault(entry.phase, []).append(entry.job)
    return [
        f"phase {phase} is none of submission {look.number}'s, and goes on as job {', '.join(jobs)}; "
        f"`afterok cancel {look.run.path} {phase}` ends that"
        for phase, jobs in going_on.items()
    ]


def _slurm_entries(look: Look, choice: str | None = None) -> list[JobEntry]:
    """Return the jobs that went to Slurm, or those that went there by one cluster choice."""
    numbers = {
        event["submission"]
        for event in Ledger(look.run.ledger).events()
        if event["event"] == "submission" and event["backend"] == "slurm" and choice in (None, event["choice"])
    }
    return [entry for entry in look.entries if entry.scripted in numbers]


def _ask(look: Look, choice: str, asked: set[str]) -> None:
    """Add to a look what the back end of a cluster choice tells, unless its cluster is one of those `asked` before.

    `auto` and `slurm` of two submissions may be one cluster.
    """
    backend = backend_of(look.run, choice)
    slurm = backend.slurm
    cluster = configuration_of(slurm.env) if slurm is not None else backend.name
    if cluster in asked:
        return
    tasks = backend.states(look.entries)
    asked.add(cluster)
    look.states |= {(task.job, task.index): task for task in tasks}
    if slurm is not None:
        jobs = {entry.job for entry in _slurm_entries(look)}
        look.slurms |= dict.fromkeys(jobs, slurm)
        look.accounting |= _accounting(look, slurm, jobs)


def _leave_open(look: Look, choice: str, error: UserMistake | SlurmError) -> None:
    """Say of the jobs of a cluster choice that their cluster told nothing."""
    look.unasked.append(error if isinstance(error, UserMistake) else SlurmUnavailable(str(error)))
    reason = "its cluster is not this one" if isinstance(error, OtherCluster) else "its cluster does not answer"
    for entry in _slurm_entries(look, choice):
        for index in entry.elements:
            look.states[entry.job, index] = TaskState(entry.job, index, NO_ANSWER, reason)


def _accounting(look: Look, slurm: Slurm, jobs: set[str]) -> dict[tuple[str, int], AccountingRow]:
    """Return what slurmdbd says of unsealed elements whose end neither the queue nor their worker tells."""
    wanted = {
        element.entry.job
        for phase in look.phases.values()
        for element in _untold(look, phase)
        if element.entry.job in jobs
    }
    if not wanted:
        return {}
    try:
        rows = slurm.accounting(sorted(wanted))
    except SlurmError as error:  # slurmdbd is down: the report is poorer, not absent
        look.notes.append(f"accounting was not asked: {error.message}")
        return {}
    entries = {entry.job: entry for entry in look.entries}
    told: dict[tuple[str, int], AccountingRow] = {}
    for row in rows or []:
        job, _, tasks = row.job_id.partition("_")
        if row.name != entries[job].name:  # a controller that lost its last seconds gave the id to another job
            continue
        for task in parse_indices(tasks.strip("[]")) if tasks else [None]:
            told |= {(job, i): row for i in entries[job].elements_of(task)}
    return told


def _untold(look: Look, phase: FrozenPhase) -> list[Element]:
    """Return the unsealed elements of a phase of which neither the queue nor their worker tells how they ended."""
    if look.seal(phase) is not None:
        return []
    sealed = look.run.artifact(phase).sealed_elements()
    return [
        element
        for element in look.elements(phase).values()
        if element.index not in sealed and element.outcome is None and not element.is_active
    ]
