"""The jobs of earlier submissions that the back ends still list as waiting or running, by phase."""

from collections.abc import Iterable
from dataclasses import dataclass

from data_tools.base.indices import Indices
from jobs.artifacts.run_folder import RunFolder
from launchers.backends.contract import Backend, States, TaskState
from launchers.causes.states import ACTIVE_STATES, NEVER, PENDING
from launchers.planning.ledger import JobEntry, Ledger


@dataclass
class LiveJob:
    """A job of an earlier submission that the back end lists as waiting or running."""

    entry: JobEntry
    tasks: list[tuple[Indices, TaskState]]  # of those of its elements that have not ended

    @property
    def elements(self) -> Indices:
        """Those of its elements that have not ended."""
        return _union(self.tasks)

    @property
    def waits(self) -> bool:
        """Whether no element has started."""
        waits = all(task.state == PENDING for _, task in self.tasks)
        return waits and len(self.elements) == len(self.entry.elements)

    @property
    def links_left(self) -> int:
        """The links of a chain that have not ended."""
        return sum(task.links_left for _, task in self.tasks)

    @property
    def dead_elements(self) -> Indices:
        """The elements that wait and can never start."""
        return _union([told for told in self.tasks if told[1].state == PENDING and told[1].reason == NEVER])


def _union(tasks: list[tuple[Indices, TaskState]]) -> Indices:
    return Indices.of_spans(span for elements, _ in tasks for span in elements.spans)


def live_jobs(run: RunFolder, backends: Iterable[Backend]) -> dict[str, LiveJob]:
    """Return {phase: its newest job that is listed as waiting or running}.

    A job whose phase was sealed by it, or since it was sent, is left out: it only has to leave.
    """
    entries = {
        entry.job: entry
        for entry in Ledger(run.ledger).own_jobs()
        if (seal := run.whole_seal(entry.phase, entry.key)) is None or seal.submission < entry.submission
    }
    states, jobs = States(), dict[str, None]()
    for backend in backends if entries else []:
        active = [task for task in backend.states(list(entries.values())) if task.state in ACTIVE_STATES]
        states.add(active)
        jobs |= dict.fromkeys(task.job for task in active)
    return {entries[job].phase: LiveJob(entries[job], states.of(job)) for job in jobs}
