"""The contract that local processes and Slurm share: the same jobs in, the same state words out."""

from dataclasses import dataclass
from typing import Optional, Protocol

from launchers.plan import PlannedPhase

# Slurm's words (man squeue, JOB STATE CODES); the local driver uses the same.
PENDING, RUNNING, COMPLETED, FAILED, CANCELLED = "PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED"
NEVER = "DependencyNeverSatisfied"
ACTIVE_STATES = frozenset({
    PENDING, RUNNING, "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING",
    "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "RESV_DEL_HOLD"})


@dataclass(frozen=True)
class JobSpec:
    """One phase to submit: all its missing elements as one job (array)."""

    planned: PlannedPhase
    elements: list[int]
    needs: dict[str, str]  # phase -> dependency type; only phases that have a job of their own to wait for

    @property
    def phase(self) -> str:
        return self.planned.name

    @property
    def is_array(self) -> bool:
        return self.planned.frozen.array is not None


@dataclass(frozen=True)
class TaskState:
    """One element of one job, as the back end sees it now."""

    job: str
    index: int
    state: str
    reason: str = ""
    exit_code: Optional[int] = None


class Backend(Protocol):
    name: str

    def submit(self, number: int, specs: list[JobSpec], waiting: dict[str, str]) -> None:
        """Submit in order, writing each job to the ledger. `waiting` maps phases submitted before and still active
        to their job ids, so that dependents can wait on them."""

    def states(self, jobs: list[str]) -> list[TaskState]:
        """Elements of these jobs that the back end still knows; one that it forgot is simply absent."""

    def cancel(self, jobs: list[str]) -> None:
        """Cancel jobs; those that ended are no error."""
