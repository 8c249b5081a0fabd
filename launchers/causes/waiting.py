"""Says why an element has not started: it waits, it cannot start by itself, or what it needs cannot be sealed."""

import re

from jobs.retry import Cause
from launchers.causes.evidence import Diagnosis, Evidence
from launchers.causes.log_lines import NODE_LINE, PREEMPTED_LINE
from launchers.causes.states import ACTIVE_STATES, CANCELLED, NEVER, RUNNING

# man squeue, JOB REASON CODES. What is in neither list is reported in Slurm's own words, as waiting.
STUCK = {
    "PartitionTimeLimit": "it asks for more time than its partition allows; lower resources.time",
    "PartitionNodeLimit": "it asks for more nodes than its partition allows; lower resources.nodes",
    "PartitionDown": "its partition is down; ask the admin, or choose another partition for its role",
    "PartitionInactive": "its partition starts no jobs; ask the admin, or choose another partition for its role",
    "BadConstraints": "no node fits what it asks for; lower resources, or drop the constraint",
    "AccountNotAllowed": "its partition refuses the account; have the profile name another for it",
    "InvalidAccount": "Slurm does not know the account; correct it in the profile",
    "InvalidQOS": "Slurm does not know the QOS; correct it in the profile",
    "QOSNotAllowed": "its partition or account refuses the QOS; have the profile name another",
    "JobHeldAdmin": "an admin holds it; ask the admin",
    "JobHeldUser": "it is held; `afterok repair` releases what a killed submit left, `scontrol release` the rest",
    "JobHoldMaxRequeue": "it was requeued too often and is held; see its log, then `scontrol release`",
    "launch failed requeued held": "its launch failed on a node and it is held; `afterok repair` releases it",
    "DeadLine": "it cannot end before its deadline; submit again without one",
}
STUCK_PATTERN = re.compile(
    r"(QOS|Assoc)(Max\w*PerJob\w*|Max\w*PerNode\w*|Max\w*Wall\w*|Min\w*|Grp\w*(Minutes|Wall)\w*|\w*TimeLimit)"
    r"|AccountingPolicy"
)
OWN_LIMIT = re.compile(r"(QOS|Assoc)(Max|Grp)\w*")
PLAIN_WAIT = {
    "",
    "None",
    "Priority",
    "Resources",
    "Dependency",
    "BeginTime",
    "JobArrayTaskLimit",
    "Cleaning",
    "Licenses",
    "Reservation",
    "Prolog",
    "WaitingForScheduling",
}


def remedy_if_stuck(reason: str) -> str:
    """Return what to do about a job that will not start by itself; "" for one that only has to wait."""
    if STUCK_PATTERN.fullmatch(reason):
        return "one job alone is over a limit of your QOS or account (`sacctmgr show qos`); ask for less"
    return STUCK.get(reason, "")


def still_waits(e: Evidence) -> Diagnosis | None:
    """Say what an element waits for; every element that is still active gets its diagnosis here."""
    if e.state not in ACTIVE_STATES:
        return None
    if e.reason == NEVER:
        return upstream(e)
    if e.state in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
        return Diagnosis(
            Cause.NEVER_STARTS,
            "was requeued and is held",
            e.said,
            f"see its log, then `scontrol release {e.job}`, or `afterok cancel` and submit again",
        )
    if remedy := remedy_if_stuck(e.reason):
        return Diagnosis(Cause.NEVER_STARTS, "will not start by itself", e.said, remedy)
    if e.state == RUNNING:
        return Diagnosis(Cause.WAITING, "is under way", e.said, "nothing is wrong")
    if e.state == "SUSPENDED":
        return Diagnosis(Cause.WAITING, "is suspended", e.said, "it goes on when Slurm resumes it")
    if e.reason not in PLAIN_WAIT and e.reason.startswith(("ReqNodeNotAvail", "Nodes required", "Nodes_required")):
        return Diagnosis(
            Cause.WAITING,
            "waits for nodes that are down, drained or reserved",
            e.said,
            "it starts when they are back; `sinfo -R` says why they are away",
        )
    if OWN_LIMIT.fullmatch(e.reason):
        return Diagnosis(
            Cause.WAITING, "waits at a limit of your QOS or account", e.said, "it starts as other jobs of the limit end"
        )
    stopped = e.message if e.outcome is not None and e.outcome.state == "stopped" else ""
    requeued = stopped or e.find(PREEMPTED_LINE) or e.find(NODE_LINE)
    if requeued and e.reason in ("", "None", "BeginTime", "Resources", "Priority"):
        return Diagnosis(
            Cause.WAITING, "was interrupted and waits to start again", requeued, "nothing: it was requeued"
        )
    return Diagnosis(Cause.WAITING, "waits", e.said, "nothing is wrong")


def upstream(e: Evidence) -> Diagnosis:
    """Say which phases have to be cured first."""
    names = " and ".join(e.upstream) or "a phase"
    return Diagnosis(
        Cause.UPSTREAM,
        f"can never start: it needs {names}, which did not end sealed",
        f"reason {NEVER}",
        f"cure {names}, then `afterok submit` or `afterok resubmit` takes it along",
    )


def never_ran(e: Evidence) -> Diagnosis | None:
    """Tell of what was cancelled because what it needs failed."""
    if e.state == CANCELLED and e.reason == NEVER:
        return upstream(e)
    return None
