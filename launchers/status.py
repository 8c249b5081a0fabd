"""What became of each phase of a run: seals first, then what the back end says, then how attempts ended.

A seal is the only success. A job that a back end no longer lists, or lists as COMPLETED, without a seal is a failure
with a name, never a success.
"""

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from jobs.artifact import Artifact
from jobs.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.task import progress_path
from launchers.backend import ACTIVE_STATES, NEVER, CANCELLED, COMPLETED, FAILED, PENDING, RUNNING, TaskState
from launchers.ledger import JobEntry, Ledger
from launchers.submit import backends_of

UNKNOWN = "UNKNOWN"  # the back end lists no such job and no seal or outcome tells what became of it
NOT_SUBMITTED = "NOT_SUBMITTED"


@dataclass
class PhaseStatus:
    phase: str
    state: str
    sealed: int
    elements: int
    job: str = ""
    reason: str = ""
    message: str = ""
    exit_code: Optional[int] = None
    seconds: Optional[float] = None
    progress: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    folder: str = ""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE_STATES and self.reason != NEVER


@dataclass
class RunStatus:
    run: str
    submission: int
    phases: list[PhaseStatus]

    @property
    def finished(self) -> bool:
        """All sealed."""
        return all(phase.state == COMPLETED for phase in self.phases)

    @property
    def active(self) -> bool:
        return any(phase.active for phase in self.phases)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"finished": self.finished, "active": self.active}


def run_status(run: RunFolder) -> RunStatus:
    """The state of every phase of the newest submission: one queue call a back end, the rest from files."""
    number = run.newest_submission()
    entries = Ledger(run.ledger).jobs()
    states: dict[tuple[str, int], TaskState] = {}
    for backend in backends_of(run).values():
        for task in backend.states(entries):
            states[task.job, task.index] = task
    phases = [_phase_status(run, phase, entries, states) for phase in run.frozen(number).values()]
    return RunStatus(str(run.path), number, phases)


def _phase_status(run: RunFolder, phase: FrozenPhase, entries: list[JobEntry], states: dict) -> PhaseStatus:
    seal = run.seal(phase.name, phase.key)
    artifact = run.artifact(phase)
    if seal is not None:
        began = min((o.started for o in run.outcomes(phase.name, seal.content["submission"])),
                    default=seal.content["started_at"])
        return PhaseStatus(phase.name, COMPLETED, phase.elements, phase.elements, seal.content["job"],
                           seconds=seal.content["sealed_at"] - began, facts=seal.facts, folder=str(seal.folder),
                           tables={path.stem: json.loads(path.read_text()) for path in (artifact.folder / "tables").glob("*.json")})
    mine = [entry for entry in entries if entry.phase == phase.name and entry.key == phase.key]
    status = PhaseStatus(phase.name, NOT_SUBMITTED, len(artifact.sealed_elements()), phase.elements,
                         folder=str(artifact.folder))
    if not mine:
        return status
    entry = mine[-1]
    status.job = entry.job
    outcomes = {o.element: o for o in run.outcomes(phase.name, entry.submission)}
    tasks = {i: _element(artifact, entry, i, states.get((entry.job, i)), outcomes.get(i)) for i in entry.elements}
    worst = _worst(tasks)
    status.state, status.reason, status.exit_code = worst.state, worst.reason, worst.exit_code
    outcome = outcomes.get(worst.index)
    if outcome is not None and outcome.state != "sealed" and not status.active:
        status.message, status.exit_code = outcome.message, outcome.exit_code
    running = [i for i, task in tasks.items() if task is not None and task.state == RUNNING]
    status.progress = _progress(artifact.folder, phase, running)
    began = [o.started for o in outcomes.values()]
    status.seconds = max(o.ended for o in outcomes.values()) - min(began) if began else None
    return status


def _element(artifact: Artifact, entry: JobEntry, index: int, task: Optional[TaskState],
             outcome: Optional[Outcome]) -> Optional[TaskState]:
    """The state of one element; None when it is sealed."""
    if artifact.fans_in and artifact.element_seal_path(index).exists() and (task is None or task.state not in ACTIVE_STATES):
        return None if task is None or task.state == COMPLETED else task
    if task is None:
        if outcome is not None and outcome.state != "sealed":
            return TaskState(entry.job, index, FAILED, "", outcome.exit_code)
        return TaskState(entry.job, index, UNKNOWN, "neither a seal nor the queue knows of it")
    if task.state == COMPLETED:
        return TaskState(entry.job, index, FAILED, "ended without a seal", task.exit_code)
    return task


def _worst(tasks: dict[int, Optional[TaskState]]) -> TaskState:
    """The element to speak for the phase: a failure first, then what runs, then what waits."""
    order = {FAILED: 0, UNKNOWN: 1, RUNNING: 3, PENDING: 4, CANCELLED: 5}
    open_tasks = [task for task in tasks.values() if task is not None]
    if not open_tasks:
        return TaskState("", 0, FAILED, "all elements are sealed, their fan-in is not; submit again")
    if any(task.state in ACTIVE_STATES for task in open_tasks):
        open_tasks = [task for task in open_tasks if task.state in ACTIVE_STATES]
    return min(open_tasks, key=lambda task: order.get(task.state, 2))


def _progress(folder: Path, phase: FrozenPhase, running: list[int]) -> dict[str, Any]:
    """Progress of the running elements added up; the note is that of the first."""
    total: Counter = Counter()
    out: dict[str, Any] = {}
    for index in running:
        keep = folder if phase.elements == 1 else folder / "elements" / f"{index:04d}"
        try:
            value = json.loads(progress_path(keep, index).read_text())
        except (OSError, ValueError):
            continue
        total.update(done=value["done"], total=value["total"])
        out = {"unit": value["unit"], "note": out.get("note") or value["note"]}
    return {**out, **total} if out else {}


def format_seconds(seconds: Optional[float]) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds >= 3600 else f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
