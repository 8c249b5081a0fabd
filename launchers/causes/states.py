"""Says what the words for the state of an element or a phase mean, and which count as active or as failed.

A state is one word, and most states come with a reason. Both back ends use Slurm's words; `status` has four of its own
for what no back end can say.
"""

# Slurm's words (man squeue, JOB STATE CODES); the local driver uses the same.
PENDING = "PENDING"  # waits: for what it needs, for nodes, or to be released
RUNNING = "RUNNING"
COMPLETED = "COMPLETED"  # of a job: its script ended with 0; of a phase in `status`: it is sealed, nothing less
FAILED = "FAILED"  # ended without success; Slurm's other words for it (TIMEOUT, NODE_FAIL, …) are shown as they are
CANCELLED = "CANCELLED"  # by `afterok cancel`, by scancel, or because what it needs can never be sealed

# The words of `status` alone.
NOT_SUBMITTED = "NOT_SUBMITTED"  # no job was ever sent for the phase under its key
NOT_NEEDED = "NOT_NEEDED"  # follows the failure of a phase that did not fail
NO_ANSWER = "NO_ANSWER"  # its cluster was not asked, or did not answer, and no seal says that it is done
UNKNOWN = "UNKNOWN"  # the back end lists no such job, and no seal or outcome tells what became of it

# Reasons.
NEVER = "DependencyNeverSatisfied"  # a job that waits and can never start, since what it needs did not end as it had to
DRIVER_GONE = "the local driver is gone (killed, or a reboot)"
NO_SEAL = "ended without a seal"  # a job that ended as COMPLETED, which is a failure where there is no seal
# Why a job waits for a release: nobody released it yet, or a controller that crashed forgot that, or forgot that the
# job ran: it sends the job, or a new one of that id, to a node where the old one still is.
HELD = frozenset({"JobHeldUser", "launch failed requeued held"})

# A job in one of these states may still run: it waits, runs, or leaves. What waits for ever (NEVER) is among them.
ACTIVE_STATES = frozenset(
    {
        PENDING,
        RUNNING,
        "SUSPENDED",
        "COMPLETING",
        "CONFIGURING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "RESIZING",
        "SIGNALING",
        "SPECIAL_EXIT",
        "STAGE_OUT",
        "STOPPED",
        "RESV_DEL_HOLD",
    }
)
LOST_NODE_STATES = frozenset({"NODE_FAIL", "BOOT_FAIL"})
BEGUN_STATES = ACTIVE_STATES - {PENDING}  # has started and has not ended
NOT_FAILED_STATES = frozenset({COMPLETED, CANCELLED, NOT_SUBMITTED, NOT_NEEDED, NO_ANSWER})


def is_active(state: str, reason: str) -> bool:
    """Return whether something goes on or will; a job that waits for ever on a failed one does not."""
    return state in ACTIVE_STATES and reason != NEVER


def is_failed(state: str, reason: str) -> bool:
    """Return whether an element ended, or vanished, without its seal, and nobody asked for that.

    What can never start did not fail itself: the phase that it needs did.
    """
    return state not in ACTIVE_STATES | NOT_FAILED_STATES and reason != NEVER
