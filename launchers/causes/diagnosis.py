"""Why one element of a phase is not sealed: evidence in, diagnosis out, nothing read and nobody asked.

The rules of `classify` are tried in order, the cause before its symptoms: a rank that was killed makes its peers report
a broken collective, and srun then kills those. What a log shows stands in launchers/causes/evidence.py.
"""

import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.mistake import EXIT_MISTAKE
from data_tools.progress import EXIT_HUNG
from jobs.retry import EXIT_LEASE_HELD, EXIT_NO_INPUT, SIGNAL_BASE, Cause
from launchers.causes.evidence import (  # fmt: skip
    CANCELLED_LINE,
    COLLECTIVE_LINE,
    ENVIRONMENT_LINE,
    GPU_MEMORY_LINE,
    HOST_MEMORY_LINE,
    HUNG_LINE,
    NODE_LINE,
    PREEMPTED_LINE,
    TIME_LINE,
    Evidence,
    exit_code_of,
    first_dead_task,
    guilty_node,
    last_line,
    tracebacks,
)
from launchers.causes.states import ACTIVE_STATES, CANCELLED, FAILED, LOST_NODE_STATES, NEVER, NO_SEAL, RUNNING, UNKNOWN
from slurm.printed import format_minutes

EVIDENCE_CHARACTERS = 240
SIGNAL_NO_OUTPUT = 53  # Slurm's "signal" of a batch script whose output file it could not open


@dataclass(frozen=True)
class Diagnosis:
    cause: Cause
    what: str  # continues "sft[3] …"
    evidence: str
    remedy: str
    node: str = ""  # the one guilty node, where Slurm or the log names it
    certain: bool = True  # False: the likeliest reading of evidence that has others


Rule = Callable[[Evidence], Diagnosis | None]


def classify(evidence: Evidence) -> Diagnosis:
    """The first rule that applies; never None."""
    for rule in RULES:
        found = rule(evidence)
        if found is not None:
            return replace(found, evidence=_shortened(found.evidence))
    raise AssertionError("the last rule always applies")


# -- what still waits ---------------------------------------------------------------------------------------------

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
    """What to do about a job that will not start by itself; "" for one that only has to wait."""
    if STUCK_PATTERN.fullmatch(reason):
        return "one job alone is over a limit of your QOS or account (`sacctmgr show qos`); ask for less"
    return STUCK.get(reason, "")


def _still_waits(e: Evidence) -> Diagnosis | None:
    if e.state not in ACTIVE_STATES:
        return None
    if e.reason == NEVER:
        return _upstream(e)
    said = (
        f"Slurm says {e.state}" + (f", reason {e.reason}" if e.reason else "")
        if e.on_slurm
        else f"{e.state} {e.reason}".strip()
    )
    if e.state in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
        return Diagnosis(
            Cause.NEVER_STARTS,
            "was requeued and is held",
            said,
            f"see its log, then `scontrol release {e.job}`, or `afterok cancel` and submit again",
        )
    if remedy := remedy_if_stuck(e.reason):
        return Diagnosis(Cause.NEVER_STARTS, "will not start by itself", said, remedy)
    if e.state == RUNNING:
        return Diagnosis(Cause.WAITING, "runs", said, "nothing is wrong")
    if e.state == "SUSPENDED":
        return Diagnosis(Cause.WAITING, "is suspended", said, "it goes on when Slurm resumes it")
    if e.reason not in PLAIN_WAIT and e.reason.startswith(("ReqNodeNotAvail", "Nodes required", "Nodes_required")):
        return Diagnosis(
            Cause.WAITING,
            "waits for nodes that are down, drained or reserved",
            said,
            "it starts when they are back; `sinfo -R` says why they are away",
        )
    if OWN_LIMIT.fullmatch(e.reason):
        return Diagnosis(
            Cause.WAITING, "waits at a limit of your QOS or account", said, "it starts as other jobs of the limit end"
        )
    stopped = e.message if e.outcome is not None and e.outcome.state == "stopped" else ""
    requeued = stopped or e.find(PREEMPTED_LINE) or e.find(NODE_LINE)
    if requeued and e.reason in ("", "None", "BeginTime", "Resources", "Priority"):
        return Diagnosis(
            Cause.WAITING, "was interrupted and waits to start again", requeued, "nothing: it was requeued"
        )
    return Diagnosis(Cause.WAITING, "waits", said, "nothing is wrong")


def _upstream(e: Evidence) -> Diagnosis:
    names = " and ".join(e.upstream) or "a phase"
    return Diagnosis(
        Cause.UPSTREAM,
        f"can never start: it needs {names}, which did not end sealed",
        f"reason {NEVER}",
        f"cure {names}, then `afterok submit` or `afterok resubmit` takes it along",
    )


# -- what Slurm itself says ---------------------------------------------------------------------------------------


def _ended_by_slurm(e: Evidence) -> Diagnosis | None:
    said = f"Slurm says {e.state}" + (f", reason {e.reason}" if e.reason else "")
    time_line, preempted_line, node_line = e.find(TIME_LINE), e.find(PREEMPTED_LINE), e.find(NODE_LINE)
    if e.state in ("TIMEOUT", "DEADLINE") or (time_line and e.state not in ("PREEMPTED", "NODE_FAIL")):
        had = f"its {format_minutes(e.asked_minutes)} time limit" if e.asked_minutes else "its time limit"
        return Diagnosis(
            Cause.TIME_LIMIT,
            f"ran into {had}",
            time_line or said,
            f"raise {e.phase}.resources.time; what has checkpoints goes on from the newest when submitted again",
        )
    if e.state == "PREEMPTED" or (preempted_line and e.state in (CANCELLED, FAILED, UNKNOWN)):
        return Diagnosis(
            Cause.PREEMPTED,
            "was preempted by a job of higher priority",
            preempted_line or said,
            "submit again (checkpoints are kept), or choose a partition that is not preempted",
        )
    if e.state in LOST_NODE_STATES or (node_line and e.state in (CANCELLED, FAILED, UNKNOWN)):
        node = guilty_node(e)
        what = (
            f"lost node {node}"
            if node
            else f"lost a node of {e.row.nodelist}"
            if e.row and e.row.nodelist
            else "lost a node"
        )
        tell = f", and tell the admin about {node}" if node else ""
        return Diagnosis(Cause.NODE, what, node_line or said, f"submit again (checkpoints are kept){tell}", node)
    if e.state == "OUT_OF_MEMORY":
        return _host_memory(e, e.find(HOST_MEMORY_LINE) or said)
    return None


def _never_ran(e: Evidence) -> Diagnosis | None:
    """Cancelled before it started, or because what it needs failed."""
    if e.state == CANCELLED and e.reason == NEVER:
        return _upstream(e)
    return None


def _no_log_folder(e: Evidence) -> Diagnosis | None:
    no_output = e.row is not None and e.row.exit_signal == SIGNAL_NO_OUTPUT
    if (
        e.outcome is None
        and e.on_slurm
        and e.state not in ACTIVE_STATES
        and (no_output or (e.reason == "JobLaunchFailure" and not e.log_folder_exists))
    ):
        folder = str(Path(e.log_path).parent)
        return Diagnosis(
            Cause.NO_LOG_FOLDER,
            "did not start: Slurm could not open its log",
            f"exit code 0:{SIGNAL_NO_OUTPUT}" if no_output else f"reason {e.reason}",
            f"see that {folder} exists and is writable on the compute nodes, then submit again",
        )
    return None


def _environment(e: Evidence) -> Diagnosis | None:
    """A module or a setup line of the profile ended the job before any worker began."""
    line = e.find(ENVIRONMENT_LINE) if e.outcome is None else ""
    if not line:
        return None
    where = ENVIRONMENT_LINE.search(line)
    assert where is not None
    return Diagnosis(
        Cause.ENVIRONMENT,
        f"did not begin: its profile's {where[1]} ended the job",
        line,
        f"have {where[1]} corrected, then submit again; what it said is in {e.log_path or 'its log'}",
    )


# -- what the worker said -----------------------------------------------------------------------------------------


def _said_by_worker(e: Evidence) -> Diagnosis | None:
    if e.code == EXIT_MISTAKE and e.outcome is not None:
        return Diagnosis(
            Cause.MISTAKE, "was stopped by a mistake in its input", e.message, "correct it and submit again"
        )
    if e.code == EXIT_NO_INPUT and e.outcome is not None:
        return Diagnosis(
            Cause.NO_INPUT,
            "found no sealed input",
            e.message,
            f"seal {' and '.join(e.upstream) or 'what it needs'} first: `afterok submit` runs what is missing",
        )
    return None


# -- what the log shows -------------------------------------------------------------------------------------------

KILLED_TASK = re.compile(r"Killed|Segmentation fault|Aborted|Bus error|Illegal instruction", re.IGNORECASE)


def _gpu_memory(e: Evidence) -> Diagnosis | None:
    line = e.find(GPU_MEMORY_LINE)
    if not line:
        return None
    return Diagnosis(
        Cause.GPU_MEMORY,
        "ran out of GPU memory",
        line,
        f"lower what one GPU holds (micro-batch, pack length, recomputation), or spread {e.phase} over more GPUs",
    )


def _host_memory(e: Evidence, line: str, certain: bool = True) -> Diagnosis:
    had = f" above {e.asked_memory}" if e.asked_memory else ""
    if certain:
        return Diagnosis(Cause.HOST_MEMORY, "ran out of host memory", line, f"raise {e.phase}.resources.mem_gib{had}")
    return Diagnosis(
        Cause.HOST_MEMORY,
        "was killed by signal 9 without a word, most likely out of host memory",
        line,
        f"raise {e.phase}.resources.mem_gib{had} unless somebody killed it (the node's `dmesg` tells)",
        certain=False,
    )


def _host_memory_in_log(e: Evidence) -> Diagnosis | None:
    line = e.find(HOST_MEMORY_LINE)
    return _host_memory(e, line) if line else None


def _exception(e: Evidence) -> Diagnosis | None:
    """An exception other than a broken collective: the worker's last word, or another rank's in the log."""
    found = [block for block in tracebacks(e.log) if not COLLECTIVE_LINE.search(block.error)]
    if e.outcome is not None and e.outcome.state == "failed" and e.message and not COLLECTIVE_LINE.search(e.message):
        place = next((block.place for block in found if _same_error(block.error, e.message)), "")
        return _code(e, e.message, place)
    dead, _, how = first_dead_task(e.log)
    if found and not (dead and KILLED_TASK.search(how)):
        return _code(e, found[0].error, found[0].place)
    return None


def _code(e: Evidence, error: str, place: str) -> Diagnosis:
    return Diagnosis(
        Cause.CODE,
        "raised an exception" + (f" at {place}" if place else ""),
        error,
        f"correct the code and submit again; the traceback is in {e.log_path or 'its log'}",
    )


def _same_error(error: str, message: str) -> bool:
    """Whether a traceback's last line is the exception of the worker's message (whose module path is left out)."""
    return (
        error.rpartition(".")[2].startswith(message.partition(":")[0])
        or message.partition(":")[0] in error.partition(":")[0]
    )


def _signal_of_code(code: int | None) -> int:
    return code - SIGNAL_BASE if code is not None and SIGNAL_BASE < code <= SIGNAL_BASE + 64 else 0


def _killed(e: Evidence) -> Diagnosis | None:
    """A process that a signal ended: what srun says of the first, else the exit code."""
    if e.state in ACTIVE_STATES or e.state == CANCELLED:
        return None
    line, node, how = first_dead_task(e.log)
    number = _signal_of_code(e.exit_code if e.exit_code is not None else exit_code_of(e.row) if e.row else None)
    if e.row is not None and e.row.exit_signal not in (0, SIGNAL_NO_OUTPUT):
        number = number or e.row.exit_signal
    if line and not KILLED_TASK.search(how):
        return None
    if not line and not number:
        return None
    if e.outcome is not None and not line and number != signal.SIGKILL:
        return None  # its own last word tells more than the signal that a peer sent it
    code = f"exit code {SIGNAL_BASE + number}" if not (e.row and e.row.exit_signal) else f"exit code 0:{number}"
    if number == signal.SIGKILL or how.startswith("Killed"):
        return _host_memory(e, line or code, certain=False)
    try:
        name = signal.Signals(number).name if number else how
    except ValueError:
        name = f"signal {number}"
    if e.find(COLLECTIVE_LINE):  # NCCL's watchdog ends its process with SIGABRT
        return None
    return Diagnosis(
        Cause.CODE,
        f"crashed with {name}" + (f" on {node}" if node else ""),
        line or code,
        f"see the last lines of {e.log_path or 'its log'}",
        node,
    )


def _hung(e: Evidence) -> Diagnosis | None:
    line = e.find(HUNG_LINE)
    if not line and e.code != EXIT_HUNG:
        return None
    return Diagnosis(
        Cause.HANG,
        "stood still, and ended itself",
        line or f"exit code {EXIT_HUNG}",
        "compare the stacks of its ranks (in its log and in its folder's stacks/): the one that is not in a collective "
        "holds up the others; then submit again (checkpoints are kept)",
    )


def _lease_held(e: Evidence) -> Diagnosis | None:
    """After what the log shows: a twin started by hand may have been the first to leave a word."""
    if e.outcome is None or e.outcome.exit_code != EXIT_LEASE_HELD:
        return None
    return Diagnosis(
        Cause.LEASE_HELD,
        "left the work to another",
        e.message,
        "nothing if that one runs; if it is dead, submit again (a new attempt takes over)",
    )


def _collective(e: Evidence) -> Diagnosis | None:
    line = e.find(COLLECTIVE_LINE)
    if not line:
        return None
    return Diagnosis(
        Cause.COLLECTIVE,
        "broke in a collective: a rank waited in vain for its peers",
        line,
        "look in the log for the rank that stopped first; if none did, submit again (checkpoints are kept), and see "
        "the network if it comes back",
    )


# -- what is left -------------------------------------------------------------------------------------------------


def _driver_gone(e: Evidence) -> Diagnosis | None:
    if "local driver is gone" not in e.reason:
        return None
    return Diagnosis(
        Cause.DRIVER_GONE,
        "ended with the process that drove the local run",
        e.reason,
        "submit again: what is sealed stays, what has checkpoints goes on",
    )


def _cancelled(e: Evidence) -> Diagnosis | None:
    line = e.find(CANCELLED_LINE) if e.state == UNKNOWN else ""
    if e.state != CANCELLED and not line:
        return None
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(e.cancelled_at)) if e.cancelled_at else ""
    who = f"`afterok cancel` at {when}" if when else line or "not by afterok: a scancel, or the site's admin"
    return Diagnosis(Cause.CANCELLED, "was cancelled", who, "submit again to run it")


def _stopped(e: Evidence) -> Diagnosis | None:
    if e.outcome is None or e.outcome.state != "stopped":
        return None
    return Diagnosis(
        Cause.STOPPED, "was asked to stop and did", e.message, "submit again: it goes on from its newest checkpoint"
    )


def _lost(e: Evidence) -> Diagnosis | None:
    if e.reason == NO_SEAL:
        return Diagnosis(
            Cause.LOST,
            "ended as COMPLETED, but there is no seal",
            last_line(e) or e.reason,
            f"see {e.log_path or 'its log'} (was its script changed? does the filesystem lag?), then submit again",
        )
    if e.state != UNKNOWN:
        return None
    return Diagnosis(
        Cause.LOST,
        "is lost: neither the queue nor a seal nor its worker's last word knows what became of it",
        last_line(e) or f"job {e.job} wrote no log",
        "submit again: only what is missing runs",
    )


def _otherwise(e: Evidence) -> Diagnosis:
    code = "" if e.code is None else f" with exit code {e.code}"
    before = "before its worker spoke" if e.outcome is None and not e.log.strip() else ""
    return Diagnosis(
        Cause.UNKNOWN,
        f"ended{code} {before}".rstrip(),
        e.message or last_line(e) or f"{e.state} {e.reason}".strip(),
        f"see {e.log_path or 'its log'}",
        certain=False,
    )


RULES: tuple[Rule, ...] = (
    _still_waits, _never_ran, _ended_by_slurm, _no_log_folder, _environment, _said_by_worker, _gpu_memory,
    _host_memory_in_log, _exception, _hung, _killed, _lease_held, _collective, _driver_gone, _cancelled, _stopped,
    _lost, _otherwise,
)  # fmt: skip


def _shortened(line: str) -> str:
    line = " ".join(line.split())
    return line if len(line) <= EVIDENCE_CHARACTERS else line[: EVIDENCE_CHARACTERS - 1] + "…"
