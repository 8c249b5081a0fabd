"""Recognizes ends that Slurm, or whatever drove the job, tells of: limits, nodes, cancels, jobs that vanished."""

import time
from pathlib import Path

from data_tools.progress import counted
from jobs.health import FAILED_ON
from jobs.retry import Cause
from launchers.causes.evidence import SIGNAL_NO_OUTPUT, Diagnosis, Evidence, guilty_node, last_line
from launchers.causes.log_lines import (
    CANCELLED_LINE,
    ENVIRONMENT_LINE,
    HOST_MEMORY_LINE,
    LAUNCH_LINE,
    NODE_LINE,
    PREEMPTED_LINE,
    TIME_LINE,
)
from launchers.causes.memory import host_memory
from launchers.causes.states import CANCELLED, DRIVER_GONE, FAILED, LOST_NODE_STATES, NO_SEAL, UNKNOWN
from slurm.printed import format_minutes

UNTOLD_STATES = (CANCELLED, FAILED, UNKNOWN)  # which do not say that Slurm ended the job; its log may


def time_limit(e: Evidence) -> Diagnosis | None:
    """Tell of an element that ran into the time limit of its job."""
    line = e.find(TIME_LINE)
    if e.state not in ("TIMEOUT", "DEADLINE") and (not line or e.state in ("PREEMPTED", "NODE_FAIL")):
        return None
    limit = f"its {format_minutes(e.asked_minutes)} time limit" if e.asked_minutes else "its time limit"
    return Diagnosis(
        Cause.TIME_LIMIT,
        f"ran into {limit}",
        line or e.said,
        f"raise {e.phase}.resources.time; what has checkpoints goes on from the newest when submitted again",
    )


def preempted(e: Evidence) -> Diagnosis | None:
    """Tell of an element that a job of higher priority ended."""
    line = e.find(PREEMPTED_LINE)
    if e.state != "PREEMPTED" and (not line or e.state not in UNTOLD_STATES):
        return None
    return Diagnosis(
        Cause.PREEMPTED,
        "was preempted by a job of higher priority",
        line or e.said,
        "submit again (checkpoints are kept), or choose a partition that is not preempted",
    )


def node_lost(e: Evidence) -> Diagnosis | None:
    """Tell of an element that ended with its node or never began there, and name the node where it is known."""
    line = e.find(NODE_LINE)
    if e.state not in LOST_NODE_STATES and (not line or e.state not in UNTOLD_STATES):
        return None
    remedy = "submit again (checkpoints are kept)"
    if node := guilty_node(e):
        # where srun launched nothing, its exit code is Slurm's errno, no signal's
        what = "could not begin on node" if LAUNCH_LINE.search(line) else "lost node"
        return Diagnosis(
            Cause.NODE,
            f"found node {node} unfit" if FAILED_ON in line else f"{what} {node}",
            line or e.said,
            f"{remedy}, and tell the admin about {node}",
            node=node,
        )
    what = f"lost a node of {e.row.nodelist}" if e.row is not None and e.row.nodelist else "lost a node"
    return Diagnosis(Cause.NODE, what, line or e.said, remedy)


def out_of_memory(e: Evidence) -> Diagnosis | None:
    """Tell of an element that Slurm ended for the memory it took."""
    return host_memory(e, e.find(HOST_MEMORY_LINE) or e.said) if e.state == "OUT_OF_MEMORY" else None


def no_log_folder(e: Evidence) -> Diagnosis | None:
    """Tell of a job that Slurm could not start for want of a place for its log."""
    no_output = e.row is not None and e.row.exit_signal == SIGNAL_NO_OUTPUT
    no_folder = e.reason == "JobLaunchFailure" and not e.log_folder_exists
    if e.outcome is not None or not e.on_slurm or not (no_output or no_folder):
        return None
    return Diagnosis(
        Cause.NO_LOG_FOLDER,
        "did not start: Slurm could not open its log",
        f"exit code 0:{SIGNAL_NO_OUTPUT}" if no_output else f"reason {e.reason}",
        f"see that {Path(e.log_path).parent} exists and is writable on the compute nodes, then submit again",
    )


def environment(e: Evidence) -> Diagnosis | None:
    """Tell of a job that a module or a setup line of the profile ended before any worker began."""
    line = e.find(ENVIRONMENT_LINE) if e.outcome is None else ""
    match = ENVIRONMENT_LINE.search(line)
    if match is None:
        return None
    return Diagnosis(
        Cause.ENVIRONMENT,
        f"did not begin: its profile's {match[1]} ended the job",
        line,
        f"have {match[1]} corrected, then submit again; what it said is in {e.log_name}",
    )


def driver_gone(e: Evidence) -> Diagnosis | None:
    """Tell of a local run whose driver was killed."""
    if e.reason != DRIVER_GONE:
        return None
    return Diagnosis(
        Cause.DRIVER_GONE,
        "ended with the process that drove the local run",
        e.reason,
        "submit again: what is sealed stays, what has checkpoints goes on",
    )


def cancelled(e: Evidence) -> Diagnosis | None:
    """Tell who cancelled an element, and when where that was afterok."""
    line = e.find(CANCELLED_LINE) if e.state == UNKNOWN else ""
    if e.state != CANCELLED and not line:
        return None
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(e.cancelled_at)) if e.cancelled_at else ""
    who = f"`afterok cancel` at {when}" if when else line or "not by afterok: a scancel, or the site's admin"
    done = e.outcome.done if e.outcome is not None else None
    remedy = f"submit again: it goes on from step {counted(done)}" if done else "submit again to run it"
    return Diagnosis(Cause.CANCELLED, "was cancelled", who, remedy)


def lost(e: Evidence) -> Diagnosis | None:
    """Tell of an element that nobody knows the end of."""
    if e.reason == NO_SEAL:
        return Diagnosis(
            Cause.LOST,
            "ended as COMPLETED, but there is no seal",
            last_line(e) or e.reason,
            f"see {e.log_name} (was its script changed? does the filesystem lag?), then submit again",
        )
    if e.state != UNKNOWN:
        return None
    return Diagnosis(
        Cause.LOST,
        "is lost: neither the queue nor a seal nor its worker's last word knows what became of it",
        last_line(e) or f"job {e.job} wrote no log",
        "submit again: only what is missing runs",
    )
