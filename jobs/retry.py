"""How a worker ends, and whether what it left unsealed is run again in place: a pure policy.

An element is repeated only where that is safe and can help: after a stop at a durable checkpoint as often as each
restart got further than the one before, after an error of the code never, and after any other cause as often as the
table of budgets says. What a cause is read from stands in launchers/causes/diagnosis.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from data_tools.mistake import EXIT_MISTAKE
from data_tools.progress import counted

EXIT_SEALED = 0
EXIT_FAILED = 1
EXIT_LEASE_HELD = 3
EXIT_NO_INPUT = 4  # an upstream phase has no seal
EXIT_UNFINISHED = 5  # stopped when asked to, at a durable checkpoint
EXIT_NOT_NEEDED = 6  # what it would have mended is sealed

SIGNAL_BASE = 128  # a shell's exit code of a killed process is this plus the signal
SIGTERM = 15


class Cause(StrEnum):
    """Why an element is not sealed: the one list, for retry budgets and for `why`. People and --json read the value."""

    MISTAKE = "user mistake"
    CODE = "python exception"
    HOST_MEMORY = "out of host memory"
    GPU_MEMORY = "out of GPU memory"
    COLLECTIVE = "collective time-out"
    HANG = "no progress"  # seen by a rank itself (megatron_ext/training/watch.py)
    ENGINE = "engine died"  # of an element that samples by vLLM, whose processes are not ours
    TIME_LIMIT = "time limit"
    PREEMPTED = "preempted"
    NODE = "node failure"
    NO_INPUT = "missing input"
    LEASE_HELD = "lease held by another"
    CANCELLED = "cancelled"
    STOPPED = "stopped"  # when asked to, at a checkpoint, and not started again
    UPSTREAM = "upstream not sealed"
    NEVER_STARTS = "cannot start"
    WAITING = "waiting"  # nothing is wrong
    DRIVER_GONE = "local driver gone"
    NO_LOG_FOLDER = "log folder missing"
    ENVIRONMENT = "environment not set up"  # a module or a setup line of the profile ended the job
    NOT_NEEDED = "not needed"
    LOST = "lost"
    UNKNOWN = "unknown"

    @property
    def is_trouble(self) -> bool:
        """Whether something is wrong."""
        return self is not Cause.WAITING


# Restarts that an attempt gives an element for each cause; those not listed get none, for they would only happen again.
# None: as many as it makes progress.
RESTARTS: Mapping[Cause, int | None] = {
    Cause.STOPPED: None,
    Cause.PREEMPTED: 10,  # killed before it had stopped
    Cause.NODE: 3,
    Cause.COLLECTIVE: 2,
    Cause.HANG: 2,
    Cause.ENGINE: 2,
    Cause.HOST_MEMORY: 1,  # a neighbour on the node may have taken it
    Cause.TIME_LIMIT: 1,  # it did not stop within the signal's lead
    Cause.UNKNOWN: 1,
}


@dataclass(frozen=True)
class End:
    """One end of an element without a seal; `done` is how many steps were durable, where it said so."""

    cause: Cause
    done: float | None = None
    unit: str = "step"


@dataclass(frozen=True)
class Verdict:
    """Whether an element is run again after an end."""

    again: bool
    why: str  # for a user: what happens, or why nothing does


def told_by(exit_code: int) -> Cause | None:
    """Return the cause that a worker's own exit code names; None where other evidence has to tell.

    One that SIGTERM ended had not begun to ask for stops, so it is a stop too: somebody wanted it to end, and it left
    nothing half done.
    """
    return {
        EXIT_MISTAKE: Cause.MISTAKE,
        EXIT_NO_INPUT: Cause.NO_INPUT,
        EXIT_LEASE_HELD: Cause.LEASE_HELD,
        EXIT_NOT_NEEDED: Cause.NOT_NEEDED,
        EXIT_UNFINISHED: Cause.STOPPED,
        SIGNAL_BASE + SIGTERM: Cause.STOPPED,
    }.get(exit_code)


def decide(ends: Sequence[End]) -> Verdict:
    """Return whether an element runs again after the last of these ends (all of one attempt, oldest first)."""
    last, before = ends[-1], ends[:-1]
    restarts = RESTARTS.get(last.cause, 0)
    if restarts is not None:
        used = sum(end.cause == last.cause for end in before)
        if used < restarts:
            return Verdict(True, f"{last.cause}: restart {used + 1} of {restarts}")
        return Verdict(False, f"{last.cause}, after {used} of {restarts} restarts" if restarts else str(last.cause))
    reached = max((end.done or 0 for end in before), default=None)
    if reached is None or (last.done or 0) > reached:
        return Verdict(True, "goes on from there when it is restarted")
    return Verdict(
        False,
        f"no progress since the last restart, still at {last.unit} {counted(reached)}: the time "
        "until it is stopped is shorter than loading and one checkpoint interval; ask for a longer "
        "time, or checkpoint more often",
    )
