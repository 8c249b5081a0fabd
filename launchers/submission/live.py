"""The jobs of earlier submissions that the back ends still list as waiting or running, by phase."""

from collections.abc import Iterable
from dataclasses import dataclass

from jobs.artifacts.run_folder import RunFolder
from launchers.backends.contract import Backend, TaskState
from launchers.causes.states import ACTIVE_STATES, NEVER, PENDING
from launchers.planning.ledger import JobEntry, Ledger


@dataclass
class LiveJob:
    """A job of an earlier submission that the back end lists as waiting or running."""

    entry: JobEntry
    tasks: dict[int, TaskState]  # by element: those of its elements that have not ended

    @property
    def waits(self) -> bool:
        """Whether no element has started."""
        return len(self.tasks) == len(self.entry.elements) and all(t.state == PENDING for t in self.tasks.values())

    @property
    def links_left(self) -> int:
        """The links of a chain that have not ended."""
        return sum(task.links_left for task in self.tasks.values())

    @property
    def dead_elements(self) -> list[int]:
        """The elements that wait and can never start."""
        return [i for i, task in self.tasks.items() if task.state == PENDING and task.reason == NEVER]


def live_jobs(run: RunFolder, backends: Iterable[Backend]) -> dict[str, LiveJob]:
    """Return {phase: its newest job that is listed as waiting or running}.

    A job whose phase was sealed by it, or since it was sent, is left out: it only has to leave.
    """
    entries = {
        entry.job: entry
        for entry in Ledger(run.ledger).own_jobs()
        if (seal := run.whole_seal(entry.phase, entry.key)) is None or seal.submission < entry.submission
    }
    tasks: dict[str, dict[int, TaskState]] = {}
    for backend in backends if entries else []:
        for task in backend.states(list(entries.values())):
            if task.state in ACTIVE_STATES:
                tasks.setdefault(task.job, {})[task.index] = task
    return {entries[job].phase: LiveJob(entries[job], by_element) for job, by_element in tasks.items()}
