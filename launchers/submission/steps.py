"""The steps of a submission: Submit a phase's job, Rewire a job that waits, Cancel one.

Each step knows how it is written to the journal, how it is shown to the user, how it is carried out, and how it is
recovered: a submitter may be killed anywhere in `carry_out`, and calling it again then finishes the step without doing
anything twice. A rewiring or a cancelling is simply done once more; a job is looked up by its name first.
"""

import abc
import dataclasses
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jobs.artifacts.run_folder import RunFolder
from launchers.backends.contract import Backend, OutcomeOpen
from launchers.planning.chain import last_link
from launchers.planning.ledger import JobEntry, Ledger, read_elements, told_elements
from launchers.submission.patience import patiently

SEND_TRIES = 3  # how often a job is sent when nobody says what became of the sbatch before


@dataclass
class Execution:
    """A submission while its steps are carried out: where its jobs go, and which jobs are known by now."""

    run: RunFolder
    number: int
    backend: Backend
    awaited: dict[str, str]  # phase -> the job that its dependents wait on; several are joined by ":"
    sent: dict[str, str] = field(default_factory=dict)  # phase -> its job in this submission
    begun: frozenset[str] = frozenset()  # names of the jobs that a killed submitter was about to send, or sent
    recorded: Mapping[str, str] = field(default_factory=dict)  # name -> id of the jobs that the ledger has already

    @property
    def ledger(self) -> Ledger:
        """The run's ledger, which is told of each step once it was done."""
        return Ledger(self.run.ledger)

    def waits(self, needs: Mapping[str, str]) -> dict[str, str]:
        """Return {phase: the job to wait on} of those of `needs` that have a job."""
        return {phase: self.awaited[phase] for phase in needs if phase in self.awaited}


@dataclass(frozen=True)
class Step(abc.ABC):
    """One thing that a submission does for one phase."""

    WORD: ClassVar[str]  # what the journal calls this kind of step

    phase: str

    def record(self) -> dict[str, Any]:
        """Return what the journal says of this step."""
        return {"do": self.WORD, **{entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}}

    @abc.abstractmethod
    def shown(self, backend: Backend, number: int, jobs: Mapping[str, str], new: Container[str]) -> str:
        """Return the call that this step makes, as one would type it.

        `jobs` is {phase: job to wait on}; of the phases in `new` this submission sends the job itself.
        """

    @abc.abstractmethod
    def carry_out(self, execution: Execution) -> None:
        """Do what is left of this step, and write into the ledger that it was done.

        Raises:
            Refused: the cluster said no; Overtaken where a job to be changed has begun meanwhile.
            OutcomeOpen: the cluster does not answer.
        """


@dataclass(frozen=True)
class Submit(Step):
    """Send a job that carries a phase, or some of its elements."""

    WORD = "submit"

    key: str
    name: str  # of the job: carries run, phase, attempt and a token that no other job's name has
    elements: Sequence[int]
    is_array: bool = False
    needs: dict[str, str] = field(default_factory=dict)  # phase without a seal -> dependency type
    request: str = ""  # a digest of what the script asks Slurm for
    batch: int = 1  # elements per array task
    links: int = 0  # of a chain; 0 where the job is none

    def record(self) -> dict[str, Any]:
        return super().record() | {"elements": told_elements(self.elements)}

    def shown(self, backend: Backend, number: int, jobs: Mapping[str, str], new: Container[str]) -> str:
        return backend.shown_send(
            number=number,
            phase=self.phase,
            needs=self.needs,
            waits=_waits_shown(self.needs, jobs),
            hold=self._hold(new),
        )

    def carry_out(self, execution: Execution) -> None:
        waits = execution.waits(self.needs)
        job = execution.recorded.get(self.name)
        if job is None:
            job = self._found_again(execution.backend) if self.name in execution.begun else None
            if job is None:
                job = self._sent(execution, waits)
            execution.ledger.append(
                "job",
                submission=execution.number,
                phase=self.phase,
                key=self.key,
                job=job,
                name=self.name,
                elements=told_elements(self.elements),
                is_array=self.is_array,
                needs=self.needs,
                waits=waits,
                request=self.request,
                batch=self.batch,
                links=self.links,
            )
        execution.sent[self.phase] = job
        awaited = last_link(job, self.links)
        if self.phase in execution.awaited and not self.links:  # other elements of the phase are under way
            awaited = f"{execution.awaited[self.phase]}:{awaited}"
        execution.awaited[self.phase] = awaited

    def entry(self, number: int) -> JobEntry:
        """Return what the ledger would say of this step's job, whose id is not known, as one of submission `number`."""
        return JobEntry(
            submission=number,
            phase=self.phase,
            key=self.key,
            job="",
            elements=self.elements,
            is_array=self.is_array,
            name=self.name,
            request=self.request,
            scripted=number,
            batch=self.batch,
            links=self.links,
        )

    def _hold(self, new: Container[str]) -> bool:
        """Return whether nothing but the release keeps this job from running: it waits on no job that is new too."""
        return not any(phase in new for phase in self.needs)

    def _sent(self, execution: Execution, waits: dict[str, str]) -> str:
        """Send the job and return its id; after an open outcome it is looked up by its name before it is sent again."""
        execution.ledger.append("sending", submission=execution.number, phase=self.phase, name=self.name)
        for attempt in range(1, SEND_TRIES + 1):
            try:
                return execution.backend.send(
                    number=execution.number,
                    phase=self.phase,
                    name=self.name,
                    needs=self.needs,
                    waits=waits,
                    hold=self._hold(execution.sent),
                )
            except OutcomeOpen:
                job = self._found_again(execution.backend)
                if job is not None:
                    return job
                if attempt == SEND_TRIES:
                    raise
        raise AssertionError("unreachable")

    def _found_again(self, backend: Backend) -> str | None:
        """Return the id of the job with this name; None where the back end, once it answers, lists none."""
        jobs = patiently(lambda: backend.find([self.name])).get(self.name)
        return jobs[0] if jobs else None


@dataclass(frozen=True)
class Rewire(Step):
    """Have a job of an earlier submission, which waits still, wait on other jobs and run the phase as it is now."""

    WORD = "rewire"

    key: str
    job: str
    needs: dict[str, str] = field(default_factory=dict)  # phase without a seal -> dependency type
    only: int | None = None  # just this array task, which waits on its partner alone

    def shown(self, backend: Backend, number: int, jobs: Mapping[str, str], new: Container[str]) -> str:
        return backend.shown_rewire(self.job, self.needs, _waits_shown(self.needs, jobs), self.only)

    def carry_out(self, execution: Execution) -> None:
        waits = execution.waits(self.needs)
        scripted = next(entry.scripted for entry in execution.ledger.jobs() if entry.job == self.job)
        execution.run.redirect(scripted, self.phase, execution.number)
        patiently(lambda: execution.backend.rewire(self.job, self.needs, waits, self.only))
        execution.ledger.append(
            "rewire",
            submission=execution.number,
            phase=self.phase,
            key=self.key,
            job=self.job,
            waits=waits,
            needs=self.needs,
            only=self.only,
        )


@dataclass(frozen=True)
class Cancel(Step):
    """Cancel a job of an earlier submission, or one element of it (12_3), which a new job replaces."""

    WORD = "cancel"

    job: str

    def shown(self, backend: Backend, number: int, jobs: Mapping[str, str], new: Container[str]) -> str:
        return f"scancel {self.job}"

    def carry_out(self, execution: Execution) -> None:
        execution.ledger.append("cancel", submission=execution.number, jobs=[self.job])
        patiently(lambda: execution.backend.cancel([self.job]))


KINDS: dict[str, type[Step]] = {kind.WORD: kind for kind in (Submit, Rewire, Cancel)}
FIELDS = {"do"}.union(*({entry.name for entry in dataclasses.fields(kind)} for kind in KINDS.values()))


def step_of(record: dict[str, Any]) -> Step:
    """Return the step that an entry of a journal tells of; journals of before give each step the fields of all kinds.

    Raises:
        KeyError, TypeError: it is no step.
    """
    if unknown := record.keys() - FIELDS:
        raise TypeError(f"no step has {', '.join(sorted(unknown))}")
    kind = KINDS[record["do"]]
    names = {entry.name for entry in dataclasses.fields(kind)}
    told = {name: value for name, value in record.items() if name in names}
    return kind(**told | ({"elements": read_elements(told["elements"])} if "elements" in names else {}))


def _waits_shown(needs: Mapping[str, str], jobs: Mapping[str, str]) -> dict[str, str]:
    """Return {phase: job to wait on} of all `needs`, with <phase> for a job that is not sent yet."""
    return {phase: jobs.get(phase, f"<{phase}>") for phase in needs}
