"""How a worker ends, and whether what it left unsealed is run again in place: a pure policy.

An element is repeated only where that is safe and can help: after a stop at a durable checkpoint as often as each
restart got further than the one before, after an end that nobody explains once, after an error of the code never.
"""

from dataclasses import dataclass
from typing import Iterable, Mapping, Optional, Sequence

from data_tools.mistake import EXIT_MISTAKE

EXIT_SEALED = 0
EXIT_FAILED = 1
EXIT_LEASE_HELD = 3
EXIT_NO_INPUT = 4  # an upstream phase has no seal
EXIT_UNFINISHED = 5  # stopped when asked to, at a durable checkpoint

SIGNAL_BASE = 128  # a shell's exit code of a killed process is this plus the signal
SIGKILL, SIGTERM = 9, 15

STOPPED, NODE_FAILURE, UNKNOWN = "stopped", "node failure", "unknown"
CODE_ERROR, MISTAKE, MISSING_INPUT, LEASE_HELD = "code error", "mistake", "missing input", "lease held"

# Restarts an element gets for each class of failure; None: as many as it makes progress.
RESTARTS: Mapping[str, Optional[int]] = {
    STOPPED: None, NODE_FAILURE: 3, UNKNOWN: 1, CODE_ERROR: 0, MISTAKE: 0, MISSING_INPUT: 0, LEASE_HELD: 0}


@dataclass(frozen=True)
class End:
    """One end of an element without a seal; `done` is how many steps were durable, where it said so."""

    failure: str
    done: Optional[int] = None
    unit: str = "step"


@dataclass(frozen=True)
class Verdict:
    again: bool
    why: str  # for a user: what happens, or why nothing does


def failure_of(exit_code: int) -> str:
    """The class of a worker's exit code (128 + signal for a killed one).

    One that SIGTERM ended had not begun to ask for stops, so it is a stop too: somebody wanted it to end, and it left
    nothing half done.
    """
    if exit_code in (EXIT_UNFINISHED, SIGNAL_BASE + SIGTERM):
        return STOPPED
    if exit_code > SIGNAL_BASE:
        return UNKNOWN
    return {EXIT_MISTAKE: MISTAKE, EXIT_NO_INPUT: MISSING_INPUT, EXIT_LEASE_HELD: LEASE_HELD}.get(exit_code, CODE_ERROR)


def decide(ends: Sequence[End]) -> Verdict:
    """Whether an element runs again after the last of these ends (all of one attempt, oldest first)."""
    last, before = ends[-1], ends[:-1]
    restarts = RESTARTS[last.failure]
    if restarts is not None:
        used = sum(end.failure == last.failure for end in before)
        if used < restarts:
            return Verdict(True, f"{last.failure}: restart {used + 1} of {restarts}")
        return Verdict(False, f"{last.failure}, after {used} of {restarts} restarts" if restarts else last.failure)
    reached = max((end.done or 0 for end in before), default=None)
    if reached is None or (last.done or 0) > reached:
        return Verdict(True, "goes on from there when it is restarted")
    return Verdict(False, f"no progress since the last restart, still at {last.unit} {reached:,}: the time until it is "
                          "stopped is shorter than loading and one checkpoint interval; ask for a longer time, or "
                          "checkpoint more often")


def requeue_refusal(job: Mapping[str, str], received: Iterable[int]) -> str:
    """Why a worker that stopped after the signals `received` must not requeue its own Slurm job; "" when it should.

    `job` is what `scontrol show job` says. Seen on Slurm 22.05: a requeue brings a job back that scancel had just
    ended; a preemption with GraceTime leaves the job RUNNING, and one that ends by itself meanwhile is FAILED.
    """
    if job.get("JobState") != "RUNNING":
        return "Slurm is ending the job itself"
    if job.get("BatchFlag") != "1":
        return "it is no batch job"
    if job.get("Requeue") != "1":
        return "its job may not be requeued (--no-requeue or JobRequeue=0)"
    preempted = job.get("PreemptTime", "None") not in ("None", "Unknown")
    if not preempted and SIGTERM in received:
        return "SIGTERM came from neither a preemption nor the time limit"
    return ""
