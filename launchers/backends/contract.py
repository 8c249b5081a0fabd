"""Defines what local processes and Slurm share: the same jobs go in, the same state words come out."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from data_tools.base import durable
from data_tools.base.indices import Indices
from data_tools.mistake import UserMistake
from launchers.planning.ledger import JobEntry
from launchers.planning.plan import PlannedPhase
from slurm.client import Slurm

LATER = ("reservation", "licenses", "gres", "node_type")


class OutcomeOpen(UserMistake):
    """A call got no answer in time: it may have happened all the same. Look before asking again."""

    exit_code = 1


class Refused(UserMistake):
    """The cluster said no, in its own words and all of them, and whom its profile names as contact."""


class Overtaken(Refused):
    """A job that was to be changed while it waited has begun or ended since the queue was read."""


@dataclass(frozen=True)
class JobSpec:
    """One phase to submit: elements that go as one job (array), under a name that nothing else carries."""

    planned: PlannedPhase
    name: str
    elements: Sequence[int]
    needs: dict[str, str]  # phase -> dependency type; only phases that have a job to wait for
    links: int = 0  # of a chain

    @property
    def phase(self) -> str:
        return self.planned.name

    @property
    def is_array(self) -> bool:
        return self.planned.frozen.array is not None


@dataclass(frozen=True, slots=True)  # a run may have a million
class TaskState:
    """One element of one job, as the back end sees it now, or several alike that it tells of together.

    A PENDING one that can never start has reason NEVER.
    """

    job: str
    index: int  # the first of them
    state: str
    reason: str = ""
    exit_code: int | None = None
    links_left: int = 0  # of a chain: its links that have not ended
    alike: Indices | None = None  # all of them, where they are several

    @property
    def elements(self) -> Indices:
        """Return the elements that this tells of."""
        return self.alike if self.alike is not None else Indices([(self.index, self.index + 1)])


class States:
    """What back ends tell of the elements of jobs, with several that wait alike kept as one."""

    def __init__(self, tasks: Iterable[TaskState] = ()):
        self._single: dict[str, dict[int, TaskState]] = {}  # job -> element -> what is told of it alone
        self._shared: dict[str, list[TaskState]] = {}  # job -> what is told of several of its elements
        self.add(tasks)

    def add(self, tasks: Iterable[TaskState]) -> None:
        """Add what a back end tells."""
        for task in tasks:
            if task.alike is None:
                self._single.setdefault(task.job, {})[task.index] = task
            else:
                self._shared.setdefault(task.job, []).append(task)

    def get(self, job: str, element: int) -> TaskState | None:
        """Return what is told of one element of a job, which may be told of others too; None where nothing is."""
        single = self._single.get(job, {}).get(element)
        if single is not None:
            return single
        return next((task for task in self._shared.get(job, ()) if element in task.elements), None)

    def of(self, job: str) -> list[tuple[Indices, TaskState]]:
        """Return (elements, what is told of them) of a job, no element twice; those told of alike come together."""
        single = self._single.get(job, {})
        alike: dict[tuple[Any, ...], list[int]] = {}
        for element, task in single.items():
            alike.setdefault((task.state, task.reason, task.exit_code, task.links_left), []).append(element)
        found = [(Indices.of(elements), single[elements[0]]) for elements in alike.values()]
        told = Indices.of(single)
        for task in self._shared.get(job, ()):
            if left := task.elements - told:
                found.append((left, task))
                told = told | left
        return found


def request_of(planned: PlannedPhase) -> str:
    """Return a digest of what a phase's job asks for, as the ledger keeps it; jobs of before said none of LATER."""
    asked = {key: value for key, value in asdict(planned.resources).items() if key not in LATER or value is not None}
    request = [planned.frozen.uses, planned.frozen.throttle, planned.frozen.batch, asked]
    return durable.sha256_bytes(durable.canonical_json(request))[:16]


class Backend(Protocol):
    """Calls that reach the cluster raise OutcomeOpen when nobody answered and Refused when the answer was no."""

    name: str
    can_rewire: bool

    @property
    def slurm(self) -> Slurm | None:
        """Return what asks the cluster; None where there is none."""

    def prepare(self, number: int, specs: list[JobSpec]) -> None:
        """Write what a submission's jobs need to run, before the first of them is sent."""

    def send(self, number: int, phase: str, name: str, needs: dict[str, str], waits: dict[str, str], hold: bool) -> str:
        """Send one prepared job and return its id. `waits` gives the job ids of `needs`."""

    def differs(self, entry: JobEntry, planned: PlannedPhase) -> str:
        """Say how what would be sent of a phase now differs from what was sent of it; "" where it does not."""

    def find(self, names: list[str]) -> dict[str, list[str]]:
        """Return {name: ids of the jobs that carry it and were not cancelled}."""

    def rewire(self, job: str, needs: dict[str, str], waits: dict[str, str], only: int | None) -> None:
        """Let a waiting job (or one element of it) wait on these jobs and no others."""

    def release(self, number: int, jobs: list[str]) -> None:
        """Let held jobs go; those that are not held are no error."""

    def states(self, jobs: list[JobEntry]) -> list[TaskState]:
        """Return the elements of these jobs that the back end still knows; one that it forgot is simply absent.

        Several that wait alike may come as one.
        """

    def cancel(self, jobs: list[str]) -> None:
        """Cancel jobs (12) or elements (12_3); those that ended are no error."""

    def shown_send(self, number: int, phase: str, needs: dict[str, str], waits: dict[str, str], hold: bool) -> str:
        """Return what `send` runs, as one would type it."""

    def shown_rewire(self, job: str, needs: dict[str, str], waits: dict[str, str], only: int | None) -> str:
        """Return what `rewire` runs, as one would type it."""
