"""Looks once at a run: at its seals, at what its clusters say, and at how attempts ended; for status and why.

A seal is the only success. A job that a back end no longer lists, or lists as COMPLETED, without a seal is a failure
with a name, never a success. One look costs one squeue, and one sacct only when the queue no longer tells how an
unsealed element ended; without slurmdbd the files of the run have to say it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from data_tools.base.indices import Indices
from data_tools.mistake import UserMistake
from jobs.artifacts.gathered import Gathered
from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder, in_order
from jobs.artifacts.seal import Seal
from launchers.backends.choose import OtherCluster, backend_of, choices_of
from launchers.backends.contract import States, TaskState
from launchers.causes.evidence import exit_code_of
from launchers.causes.states import ACTIVE_STATES, COMPLETED, FAILED, NO_ANSWER, NO_SEAL, UNKNOWN
from launchers.causes.traces import lease_times
from launchers.planning.ledger import JobEntry, Ledger
from slurm.client import Slurm, SlurmError, SlurmUnavailable, configuration_of
from slurm.printed import AccountingRow, read_indices

SEALED_READ = 32  # of the sealed elements of a phase that goes on, the first and last whose outcomes are read
Accounts = dict[str, list[tuple[Indices, AccountingRow]]]  # job -> what accounting says of its elements

# -- elements -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)  # a run may have a million
class Element:
    """One element of a phase, as its newest job left it, or several of which the same is known."""

    index: int  # the first of them
    entry: JobEntry
    task: TaskState | None  # None: the back end does not know it (any more)
    outcome: Outcome | None  # None: its newest life has not said how it ended
    accounting: AccountingRow | None = None
    alike: Indices | None = None  # all of them, where they are several

    @property
    def indices(self) -> Indices:
        """Return the elements that this tells of."""
        return self.alike if self.alike is not None else Indices([(self.index, self.index + 1)])

    def only(self, indices: Indices) -> "Element":
        """Return the same of those of its elements alone, of which there are some."""
        if len(indices) == len(self.indices):
            return self
        return replace(self, index=indices[0], alike=indices if len(indices) > 1 else None)

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
    states: States  # what the back ends still list
    accounting: Accounts = field(default_factory=dict)
    slurms: dict[str, Slurm] = field(default_factory=dict)  # job -> the cluster it went to
    notes: list[str] = field(default_factory=list)  # what could not be asked
    unasked: list[UserMistake] = field(default_factory=list)  # why clusters told nothing
    lives: dict[str, list[Any]] = field(default_factory=dict)  # of phases: what gpu_hours.py found of them
    _newest: dict[str, list[tuple[JobEntry, Indices]]] = field(default_factory=dict)
    _elements: dict[str, list[Element]] = field(default_factory=dict)
    _sealed: dict[str, Indices] = field(default_factory=dict)
    _open_outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    _seals: dict[str, Seal] = field(default_factory=dict)
    _outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    _brief: dict[str, tuple[list[Outcome], list[Gathered]]] = field(default_factory=dict)
    _frozen: dict[int, dict[str, FrozenPhase]] = field(default_factory=dict)

    def elements(self, phase: FrozenPhase) -> list[Element]:
        """Return the elements of a phase that were ever submitted under its key, each with its newest job.

        Those come together of which the same is known: of a phase that waits they are one. In order of their first.
        """
        if phase.name not in self._elements:
            self._elements[phase.name] = list(self._read_elements(phase))
        # accounting is asked after the elements were read, for those that need it
        told = self._elements[phase.name]
        if self.accounting:
            told = [each for element in told for each in self._accounted(element)]
        return sorted(told, key=lambda element: element.index)

    def _accounted(self, element: Element) -> Iterator[Element]:
        """Yield an element, or several, with what accounting says of it; of which it says the same, together."""
        left = element.indices
        for told, row in self.accounting.get(element.entry.job, ()):
            if own := left & told:
                left = left - own
                yield replace(element.only(own), accounting=row)
        if left:
            yield element.only(left)

    def open_elements(self, phase: FrozenPhase) -> list[Element]:
        """Return the elements that were submitted and are not sealed, or whose task has still to leave."""
        if self.seal(phase) is not None:
            return []
        found = []
        for element in self.elements(phase):
            if left := element.indices if element.is_active else element.indices - self.sealed(phase):
                found.append(element.only(left))
        return found

    def sealed(self, phase: FrozenPhase) -> Indices:
        """Return the elements of a phase that have a seal of their own; listed once after each question to a queue."""
        if phase.name not in self._sealed:
            artifact = self.run.artifact(phase)
            self._sealed[phase.name] = Indices.of(artifact.sealed_elements() if artifact.fans_in else ())
        return self._sealed[phase.name]

    def last_words(self, phase: FrozenPhase) -> list[Outcome]:
        """Return how the newest lives of all elements of a phase ended, of sealed ones too: their merging may have."""
        newest = {(element, entry.submission) for entry, own in self._newest_jobs(phase) for element in own}
        told = {(o.element, o.attempt): o for o in self.outcomes(phase.name)}
        return [outcome for place, outcome in told.items() if place in newest]

    def forget(self) -> None:
        """Forget what was read of elements: a queue that was asked since may tell of some that ended meanwhile."""
        self._elements.clear()
        self._sealed.clear()
        self._open_outcomes.clear()

    def seal(self, phase: FrozenPhase) -> Seal | None:
        """Return a phase's seal; None while a job of a later submission than the seal's goes on: that one decides."""
        seal = self.whole_seal(phase)
        return None if seal is None or self._goes_on_after(phase, seal) else seal

    def whole_seal(self, phase: FrozenPhase) -> Seal | None:
        """Return a phase's seal, whatever goes on; that of many elements is long, and read once."""
        if phase.name not in self._seals:
            seal = self.run.seal(phase.name, phase.key)
            if seal is None:  # it may be sealed when it is asked for again
                return None
            self._seals[phase.name] = seal
        return self._seals[phase.name]

    def _goes_on_after(self, phase: FrozenPhase, seal: Seal) -> bool:
        """Return whether a job of a later submission than a seal's waits, runs or leaves."""
        return any(
            task.state in ACTIVE_STATES and own & told
            for entry, own in self._newest_jobs(phase)
            if entry.submission > seal.submission
            for told, task in self.states.of(entry.job)
        )

    def not_needed(self, phase: FrozenPhase) -> str:
        """Return why a phase never has to run, "" if it may."""
        return self.run.not_needed(self.phases, phase.name)

    def frozen(self, number: int) -> dict[str, FrozenPhase]:
        """Return the phases as a submission froze them; read once."""
        if number not in self._frozen:
            self._frozen[number] = self.run.frozen(number)
        return self._frozen[number]

    def first_start(self, name: str, attempt: int) -> float | None:
        """Return when the first element of an attempt at a phase began that ended by now; None where none did."""
        outcomes, gathered = self.brief(name)
        starts = [outcome.started for outcome in outcomes if outcome.attempt == attempt]
        return min([*starts, *(some.started for some in gathered if some.attempt == attempt)], default=None)

    def brief(self, name: str) -> tuple[list[Outcome], list[Gathered]]:
        """Return what `RunFolder.outcomes_in_brief` does; read once."""
        if name not in self._brief:
            whole = self._outcomes.get(name)
            self._brief[name] = (whole, []) if whole is not None else self.run.outcomes_in_brief(name)
        return self._brief[name]

    def _outcomes_of_open(self, phase: FrozenPhase) -> list[Outcome]:
        """Return what `outcomes` does, but of sealed elements those of the first and last few alone."""
        if phase.name in self._outcomes:
            return self._outcomes[phase.name]
        if phase.name not in self._open_outcomes:
            _, others = self.sealed(phase).apart(SEALED_READ)
            but, _ = others.apart(max(0, len(others) - SEALED_READ))
            self._open_outcomes[phase.name] = self.run.outcomes(phase.name, but=but)
        return self._open_outcomes[phase.name]

    def outcomes(self, name: str) -> list[Outcome]:
        """Return how all attempts at a phase ended, oldest first; read once."""
        if name not in self._outcomes:
            brief, gathered = self._brief.get(name, ([], []))
            # where nothing was gathered, what was read in brief is all
            self._outcomes[name] = in_order(brief) if brief and not gathered else self.run.outcomes(name)
        return self._outcomes[name]

    def _newest_jobs(self, phase: FrozenPhase) -> list[tuple[JobEntry, Indices]]:
        """Return (job, those elements of a phase, under its key, that no later job carries)."""
        if phase.name not in self._newest:
            found, carried = [], Indices()
            for entry in reversed(self.entries):
                if (entry.phase, entry.key) != (phase.name, phase.key):
                    continue
                if own := Indices.of(entry.elements) - carried:
                    found.append((entry, own))
                    carried = carried | own
            self._newest[phase.name] = found
        return self._newest[phase.name]

    def _read_elements(self, phase: FrozenPhase) -> Iterator[Element]:
        """Yield what `elements` returns, without what accounting says."""
        jobs = self._newest_jobs(phase)
        if not jobs:
            return
        outcomes = {(outcome.element, outcome.attempt): outcome for outcome in self._outcomes_of_open(phase)}
        leases = sorted(lease_times(self.run.artifact(phase).folder)) if outcomes else []
        restarts = {(element, attempt): restart for element, attempt, restart in leases}  # the newest of each attempt
        ended: dict[int, dict[int, Outcome]] = {}  # attempt -> element -> how its newest life ended
        for (i, attempt), outcome in outcomes.items():
            if restarts.get((i, attempt), 0) <= outcome.restart:  # else it tells of the life before a requeue
                ended.setdefault(attempt, {})[i] = outcome
        for entry, own in jobs:
            told = ended.get(entry.submission, {})
            alone = own & Indices.of(told)
            for i in alone:
                yield Element(i, entry, self.states.get(entry.job, i), told[i])
            left = own - alone
            for listed, task in self.states.of(entry.job):
                if those := left & listed:
                    left = left - those
                    yield Element(those[0], entry, task, None, alike=those if len(those) > 1 else None)
            if left:
                yield Element(left[0], entry, None, None, alike=left if len(left) > 1 else None)


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
    look = Look(run, number, phases=run.frozen(number), entries=entries, states=States())
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
        if entry.phase in look.phases:
            continue
        carried = Indices.of(entry.elements)
        if not any(task.state in ACTIVE_STATES and carried & told for told, task in look.states.of(entry.job)):
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
    look.states.add(tasks)
    look.forget()
    if slurm is not None:
        jobs = {entry.job for entry in _slurm_entries(look)}
        look.slurms |= dict.fromkeys(jobs, slurm)
        look.accounting |= _accounting(look, slurm, jobs)  # a job is one cluster's


def _leave_open(look: Look, choice: str, error: UserMistake | SlurmError) -> None:
    """Say of the jobs of a cluster choice that their cluster told nothing."""
    look.unasked.append(error if isinstance(error, UserMistake) else SlurmUnavailable(str(error)))
    reason = "its cluster is not this one" if isinstance(error, OtherCluster) else "its cluster does not answer"
    for entry in _slurm_entries(look, choice):
        elements = Indices.of(entry.elements)
        look.states.add([TaskState(entry.job, elements[0], NO_ANSWER, reason, alike=elements)])


def _accounting(look: Look, slurm: Slurm, jobs: set[str]) -> Accounts:
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
    told: Accounts = {}
    for row in rows or []:
        job, _, tasks = row.job_id.partition("_")
        if row.name != entries[job].name:  # a controller that lost its last seconds gave the id to another job
            continue
        elements = entries[job].elements_of(read_indices(tasks.strip("[]")) if tasks else None)
        told.setdefault(job, []).insert(0, (elements, row))  # of several the last one counts
    return told


def _untold(look: Look, phase: FrozenPhase) -> list[Element]:
    """Return the unsealed elements of a phase of which neither the queue nor their worker tells how they ended."""
    if look.seal(phase) is not None:
        return []
    untold = [element for element in look.elements(phase) if element.outcome is None and not element.is_active]
    return [element for element in untold if element.indices - look.sealed(phase)]
