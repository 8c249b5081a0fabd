"""Says in which state a run and each of its phases are: for `afterok status`, and for `run`, `logs` and `ls`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from data_tools.base.tables import read_tables
from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.artifacts.seal import Seal
from jobs.task import progress_path
from launchers.backends.choose import OtherCluster
from launchers.backends.contract import TaskState
from launchers.causes.states import (
    CANCELLED,
    COMPLETED,
    FAILED,
    NOT_NEEDED,
    NOT_SUBMITTED,
    PENDING,
    RUNNING,
    UNKNOWN,
    is_active,
    is_failed,
)
from launchers.causes.traces import keep_folder
from launchers.observe.gpu_hours import gpu_hours
from launchers.observe.look import Element, Look, look_at
from launchers.observe.sealed import readable
from launchers.planning import held
from launchers.planning.ledger import Ledger
from slurm.detect import NoDevCluster


class Progress(TypedDict, total=False):
    """How far the running elements of a phase are, added up; {} where none says so."""

    unit: str
    note: str
    done: float
    total: float


@dataclass
class PhaseStatus:
    """The state of one phase, in one word and what belongs to it."""

    phase: str
    state: str
    sealed: int  # elements
    elements: int
    job: str = ""
    reason: str = ""
    message: str = ""  # the last word of the worker that speaks for the phase
    exit_code: int | None = None
    seconds: float | None = None  # from the first start to the last end that is known
    progress: Progress = field(default_factory=Progress)
    facts: dict[str, Any] = field(default_factory=dict)  # what the phase itself reported when it was sealed
    tables: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    latest: str = ""  # the link to what is sealed, which people use; "" where there is none
    gpu_hours: float | None = None  # None: no attempt asked for GPUs
    gpu_hours_lost: float | None = None
    sealed_before: str = ""  # what is sealed of it under other settings or inputs, the newest, where this one is not
    written_before: bool = False  # sealed before seals had a sum over themselves

    @property
    def active(self) -> bool:
        """Return whether something goes on or will; a job that waits for ever on a failed one does not."""
        return is_active(self.state, self.reason)

    @property
    def failed(self) -> bool:
        """Return whether an element ended, or vanished, without its seal and nobody asked for that."""
        return is_failed(self.state, self.reason)


@dataclass
class RunStatus:
    """The state of a run: of every phase of its newest submission."""

    run: str
    submission: int
    phases: list[PhaseStatus]
    notes: list[str] = field(default_factory=list)  # what could not be asked, and what the cluster refused
    where: str = ""  # which cluster it went to last, by which profile of which file
    overrides: str = ""  # which are in force beside the pipeline file, since when, and the way back; of many the first
    held: list[str] = field(default_factory=list)  # all of them
    unasked: str = ""  # why a cluster of its jobs told nothing
    may_answer: bool = False  # that cluster, later

    @property
    def finished(self) -> bool:
        """Return whether all that is needed is sealed."""
        return all(phase.state in (COMPLETED, NOT_NEEDED) for phase in self.phases)

    @property
    def active(self) -> bool:
        """Return whether something of any phase goes on or will."""
        return any(phase.active for phase in self.phases)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"finished": self.finished, "active": self.active}


def run_status(run: RunFolder) -> RunStatus:
    """Return the state of every phase of the newest submission."""
    return status_of(look_at(run))


def status_of(look: Look) -> RunStatus:
    """Return the state of every phase of the newest submission, as one look found them."""
    ledger = Ledger(look.run.ledger)
    status = RunStatus(
        run=str(look.run.path),
        submission=look.number,
        phases=[_phase_status(look, phase) for phase in look.phases.values()],
        notes=list(look.notes),
        where=_where(ledger.backend(look.number)),
        overrides=held.told(look.run),
        held=[each.override for each in held.held(look.run)],
    )
    if look.unasked:
        status.unasked = look.unasked[0].problems[0].message
        status.may_answer = not any(isinstance(mistake, (OtherCluster, NoDevCluster)) for mistake in look.unasked)
        status.notes += [f"{mistake}; what is told is from the files of the run" for mistake in look.unasked]
    if not status.finished and (given_up := ledger.given_up()):
        status.notes.append(given_up)
    if folder := ledger.unsent(look.number):
        status.notes.append(f"submission {look.number} is a bundle that was not sent yet: sh {folder}/submit.sh")
    if sealed_before := [phase.phase for phase in status.phases if phase.sealed_before]:
        status.notes.append(
            f"sealed earlier, under other settings or inputs: {', '.join(sealed_before)}. These results stay, and are "
            "reused if you go back to those settings"
        )
    if before := [phase.phase for phase in status.phases if phase.written_before]:
        status.notes.append(
            f"no sum: written before, so that nobody can tell whether it was altered: the seal of {', '.join(before)}"
        )
    return status


def _where(submission: dict[str, Any]) -> str:
    """Return which cluster a submission went to, by which profile and file; "" of one that did not write it down."""
    if "profile" not in submission:
        return ""
    place = f"cluster {submission['cluster_name']}" if submission["backend"] == "slurm" else "this machine"
    return f"{place}, profile {submission['profile']}" + (
        f" ({submission['profile_file']})" if submission["profile_file"] else ", made from its own partitions"
    )


# -- one phase ----------------------------------------------------------------------------------------------------


def _phase_status(look: Look, phase: FrozenPhase) -> PhaseStatus:
    """Return the state of a phase: that of its seal, else of its jobs, else that it was not submitted or not needed."""
    artifact = look.run.artifact(phase)
    used, lost = gpu_hours(look, phase)
    status = PhaseStatus(
        phase=phase.name,
        state=NOT_SUBMITTED,
        sealed=phase.elements,
        elements=phase.elements,
        folder=str(artifact.folder),
        gpu_hours=used,
        gpu_hours_lost=lost,
    )
    seal = look.seal(phase)
    if seal is None:
        status.sealed = len(look.sealed(phase))
        status.reason = look.not_needed(phase)
        elements = look.elements(phase)
        if status.reason:
            status.state = NOT_NEEDED
        elif elements:
            open_elements = look.open_elements(phase)
            # It may have been sealed since we looked.
            seal = look.seal(phase) if not open_elements else None
            if seal is None:
                _tell_open(status, look, phase, elements=elements, open_elements=open_elements)
    if seal is not None:
        _tell_sealed(status, look, phase, seal)
    elif status.state != NOT_NEEDED and not status.active and (before := look.run.sealed_before(phase)) is not None:
        status.sealed_before = str(before)
    return status


def _tell_sealed(status: PhaseStatus, look: Look, phase: FrozenPhase, seal: Seal) -> None:
    """Fill in the status of a phase from its seal."""
    ended = seal.content.get("sealed_at", 0.0)
    began = look.first_start(phase.name, seal.submission)
    if began is None:
        began = seal.content.get("started_at", ended)
    status.state, status.sealed, status.job = COMPLETED, phase.elements, seal.content.get("job", "")
    status.seconds = max(0.0, ended - began)  # two hosts' clocks, for eyes only
    status.facts, status.folder, status.written_before = seal.facts, str(seal.folder), not seal.has_sum
    status.tables = read_tables(look.run.artifact(phase).folder)
    place = readable(look.run, phase.name, seal)
    status.latest = str(place) if place != seal.folder else ""


def _tell_open(
    status: PhaseStatus, look: Look, phase: FrozenPhase, *, elements: list[Element], open_elements: list[Element]
) -> None:
    """Fill in the status of a phase without a seal that was submitted."""
    tasks = [(element.state(), element) for element in open_elements]
    worst, speaks = _worst(tasks)
    newest = max(elements, key=lambda element: element.entry.submission).entry
    status.job = worst.job or newest.job
    status.state, status.reason, status.exit_code = worst.state, worst.reason, worst.exit_code
    outcomes = [element.outcome for element in elements if element.outcome is not None]
    outcome = speaks.outcome if speaks is not None else _fan_in_outcome(look.last_words(phase))
    if outcome is not None and outcome.state != "sealed" and not status.active:
        status.message, status.exit_code = outcome.message, outcome.exit_code
    running = [i for task, element in tasks if task.state == RUNNING for i in element.indices]
    status.progress = _progress(Path(status.folder), phase, running)
    if outcomes:
        status.seconds = max(0.0, max(o.ended for o in outcomes) - min(o.started for o in outcomes))


def _fan_in_outcome(outcomes: list[Outcome]) -> Outcome | None:
    """Return what the fan-in said where all elements are sealed, such as which element's seal is torn."""
    mistakes = [outcome for outcome in outcomes if outcome.state == "mistake"]
    return max(mistakes, key=lambda outcome: (outcome.attempt, outcome.restart), default=None)


def _worst(open_tasks: list[tuple[TaskState, Element]]) -> tuple[TaskState, Element | None]:
    """Return the element that speaks for the phase: one that goes on, else one that failed, else a cancelled one.

    Of those that go on, one that may need a person (suspended, held) comes before one that runs; one that is about to
    leave says nothing of the others.
    """
    order = {FAILED: 0, UNKNOWN: 1, RUNNING: 3, "CONFIGURING": 4, PENDING: 5, "COMPLETING": 6, CANCELLED: 7}
    if not open_tasks:
        return TaskState("", -1, FAILED, "all elements are sealed, their fan-in is not; submit again"), None
    going_on = [(task, element) for task, element in open_tasks if is_active(task.state, task.reason)]
    return min(going_on or open_tasks, key=lambda told: order.get(told[0].state, 2))


def _progress(folder: Path, phase: FrozenPhase, running: list[int]) -> Progress:
    """Return the progress of the running elements added up; the note is that of the first."""
    progress = Progress()
    for index in running:
        try:
            value = json.loads(progress_path(keep_folder(folder, phase, index), index).read_text())
            if not all(isinstance(value[name], kind) for name, kind in _TOLD.items()):
                continue
        except (OSError, ValueError, LookupError, TypeError, RecursionError):  # for eyes only: never believed
            continue
        progress = Progress(
            unit=value["unit"],
            note=progress.get("note") or value["note"],
            done=progress.get("done", 0) + value["done"],
            total=progress.get("total", 0) + value["total"],
        )
    return progress


_TOLD: dict[str, Any] = {"unit": str, "note": str, "done": (int, float), "total": (int, float)}  # by a running element
