"""The tasks of one local run as its driver counts them: which wait, which may start, and what state.json says of them.

What decides is counted, not looked for: a poll costs no more for a hundred thousand tasks than for ten.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypedDict

from jobs.schema.pipeline import NEED_SEALS
from launchers.causes.states import CANCELLED, COMPLETED, NEVER, PENDING, RUNNING
from launchers.planning.ledger import read_elements, told_elements


class LocalJob(TypedDict):
    """One job of jobs.json: what the driver has to know of a phase."""

    phase: str
    job: str
    name: str
    elements: str | list[int]  # ranges; a list in files of before
    needs: dict[str, str]  # phase -> dependency type
    throttle: int  # elements that may run at once; 0: as many as fit
    cores: int


class LocalTask(TypedDict):
    """One element of a job, as its driver knows it."""

    phase: str
    job: str
    index: int
    state: str
    reason: str
    exit_code: int | None
    restart: int


class Tasks:
    """All tasks, phase by phase; a position is a place in `all`."""

    def __init__(self, jobs: Sequence[LocalJob]):
        self.all: list[LocalTask] = [
            {
                "phase": job["phase"],
                "job": job["job"],
                "index": index,
                "state": PENDING,
                "reason": "",
                "exit_code": None,
                "restart": 0,
            }
            for job in jobs
            for index in read_elements(job["elements"])
        ]
        self.needs = {job["phase"]: job["needs"] for job in jobs}
        self.of_phase: dict[str, dict[int, LocalTask]] = {job["phase"]: {} for job in jobs}
        self.waiting: dict[str, dict[int, None]] = {job["phase"]: {} for job in jobs}  # positions, in order
        for position, task in enumerate(self.all):
            self.of_phase[task["phase"]][task["index"]] = task
            self.waiting[task["phase"]][position] = None
        self.counts = {phase: Counter({PENDING: len(tasks)}) for phase, tasks in self.of_phase.items()}
        self.told: dict[str, str] = {}  # phase -> the reason that all who wait were told last; "" where they differ

    @property
    def goes_on(self) -> bool:
        """Return whether a task waits or runs."""
        return any(counts[PENDING] + counts[RUNNING] for counts in self.counts.values())

    def enter(self, position: int, state: str, reason: str, exit_code: int | None = None) -> None:
        """Have a task be in another state; without an exit code it keeps that of its life before."""
        task = self.all[position]
        phase, counts = task["phase"], self.counts[task["phase"]]
        counts[NEVER] += (state, reason) == (CANCELLED, NEVER)
        counts[task["state"]] -= 1
        counts[state] += 1
        task |= {"state": state, "reason": reason, "exit_code": task["exit_code"] if exit_code is None else exit_code}
        if state == PENDING:  # it was there before those that never started
            self.waiting[phase] = {position: None, **self.waiting[phase]}
            self.told.pop(phase, None)
        else:
            self.waiting[phase].pop(position, None)

    def readiness(self, phase: str, index: int | None) -> str:
        """Return Slurm's reason why a phase, or its element `index`, may not start; "" where it may."""
        for upstream, type_ in self.needs[phase].items():
            tasks, counts = self.of_phase[upstream], self.counts[upstream]
            if type_ == "aftercorr" and index in tasks:
                counts = Counter({tasks[index]["state"]: 1})
            bad = sum(count for state, count in counts.items() if state not in (PENDING, RUNNING, COMPLETED, NEVER))
            if type_ in NEED_SEALS and bad:
                return NEVER
            if counts[PENDING] + counts[RUNNING]:
                return "Dependency"
            if type_ == "afternotok" and (not bad or counts[NEVER]):
                return NEVER  # what never ran did not fail either
        return ""

    def as_json(self) -> list[dict[str, Any]]:
        """Return what state.json says: of the tasks of a job that are alike, once."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        names = ("phase", "job", "state", "reason", "exit_code")
        for task in self.all:
            key = (task["phase"], task["job"], task["state"], task["reason"], task["exit_code"])
            alike.setdefault(key, []).append(task["index"])
        return [dict(zip(names, key)) | {"elements": told_elements(own)} for key, own in alike.items()]
