"""What is known of one element of a phase that is not sealed, and what the lines of its log show.

The words looked for are those of Slurm 22.05's srun and slurmstepd, PyTorch 2 and NCCL 2; tests/launchers/test_why.py
has them, seen on the dev cluster or written from those programs' known wording.
"""

import re
from dataclasses import dataclass

from data_tools.progress import HUNG
from jobs.artifacts.run_folder import Outcome
from launchers.causes.states import FAILED
from slurm.printed import AccountingRow


@dataclass(frozen=True)
class Evidence:
    """All that is known of one element that is not sealed."""

    phase: str
    index: int = 0
    job: str = ""
    state: str = FAILED  # Slurm's word, or UNKNOWN
    reason: str = ""
    exit_code: int | None = None
    outcome: Outcome | None = None
    log: str = ""  # the end of its log, of its newest life
    log_path: str = ""
    log_folder_exists: bool = True
    row: AccountingRow | None = None  # from sacct, or scontrol where there is no slurmdbd
    on_slurm: bool = True
    upstream: tuple[str, ...] = ()  # phases it needs that are not sealed and not under way
    cancelled_at: float | None = None  # by afterok
    asked_minutes: int | None = None
    asked_memory: str = ""
    down_nodes: tuple[str, ...] = ()  # of its nodes, those that Slurm calls down

    @property
    def message(self) -> str:
        return self.outcome.message if self.outcome is not None else ""

    @property
    def code(self) -> int | None:
        if self.outcome is not None:
            return self.outcome.exit_code
        return self.exit_code if self.exit_code is not None else exit_code_of(self.row) if self.row else None

    def lines(self) -> list[str]:
        return self.log.splitlines()

    def find(self, pattern: "re.Pattern[str]") -> str:
        """The line that shows it: in the worker's last words, else the first in the log."""
        if pattern.search(self.message):
            return self.message
        return next((line.strip() for line in self.lines() if pattern.search(line)), "")


def exit_code_of(row: AccountingRow) -> int:
    """A shell's view of Slurm's "code:signal"."""
    return 128 + row.exit_signal if row.exit_signal and not row.exit_code else row.exit_code


# -- lines ---------------------------------------------------------------------------------------------------------

PREEMPTED_LINE = re.compile(r"DUE TO PREEMPTION")
TIME_LINE = re.compile(r"DUE TO TIME LIMIT")
NODE_LINE = re.compile(r"DUE TO NODE FAILURE|Node failure on \S+|launch failed on node|\bNODE_FAIL\b", re.IGNORECASE)
CANCELLED_LINE = re.compile(r"slurmstepd.*: error: \*\*\* (JOB|STEP) \S+ ON \S+ CANCELLED AT (?!.* DUE TO )")
GPU_MEMORY_LINE = re.compile(
    r"torch(\.cuda)?\.OutOfMemoryError|\bOutOfMemoryError: |(CUDA|HIP) out of memory|CUDA error: out of memory"
    r"|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED"
)
HOST_MEMORY_LINE = re.compile(
    r"oom[-_]kill|\bOOM Killed\b|Out Of Memory|[Ee]xceeded (job |step )?memory limit|being killed.*memory"
    r"|\bMemoryError\b|can't allocate memory|std::bad_alloc|Cannot allocate memory"
)
COLLECTIVE_LINE = re.compile(
    r"Watchdog caught collective operation timeout|ProcessGroupNCCL.*[Tt]imeout|NCCL (error|timeout)|ncclRemoteError"
    r"|DistBackendError|DistStoreError|DistNetworkError|Socket Timeout|Broken pipe.*(?:gloo|TCPStore)"
    r"|Timed out (waiting|after) .*ms|Timed out initializing process group|wait timeout after \d+ms"
    r"|Connection closed by peer|Connection reset by peer|failed to recv, got 0 bytes"
    r"|Connection was likely closed|monitoredBarrier|MeetingFailed|MeetingTimeout"
)
HUNG_LINE = re.compile(re.escape(HUNG) + r"|^Timeout \(\d+:\d\d:\d\d[.\d]*\)!$")  # the second is faulthandler's
ENDED = "ended the job with code"  # what the lines of launchers/backends/shell_lines.py say of themselves
ENVIRONMENT_LINE = re.compile(rf"^afterok: profile .*: (env\.\w+) {re.escape(ENDED)} \d+")
NODE_NAMES = re.compile(r"Node failure on ([\w.-]+)|failed on node ([\w.-]+)")
TASK_LINE = re.compile(r"srun: error: ([\w.-]+): tasks? ([\d,-]+): (.+)")


def guilty_node(e: Evidence) -> str:
    """The node that srun names, else the only one of the job's nodes that Slurm calls down, else "" ."""
    for line in e.lines():
        found = NODE_NAMES.search(line)
        if found and "," not in (name := (found[1] or found[2])):
            return name.rstrip(":.")
    return e.down_nodes[0] if len(e.down_nodes) == 1 else ""


def first_dead_task(log: str) -> tuple[str, str, str]:
    """(line, node, how) of the rank that srun saw end first: those after it were ended because of it."""
    for line in log.splitlines():
        if found := TASK_LINE.search(line):
            return line.strip(), found[1], found[3]
    return "", "", ""


def last_line(e: Evidence) -> str:
    noise = re.compile(r"srun: (Job step aborted|got SIG|forcing|Force Terminated|Terminating)")
    return next((line.strip() for line in reversed(e.lines()) if line.strip() and not noise.search(line)), "")


# -- tracebacks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traceback:
    error: str  # its last line: "module.Error: text"
    place: str  # file:line of the innermost frame outside installed packages


FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+)')
ERROR_LINE = re.compile(r"^[A-Za-z_][\w.]*(:.*)?$")
RANK_PREFIX = re.compile(r"^(?:\[rank\d+\]:\s?|\s*\d+: )")  # torch's, and srun --label's
CHAINED = "The above exception was the direct cause", "During handling of the above exception"


def tracebacks(log: str) -> list[Traceback]:
    """Python's tracebacks in a log, in order; of a chain of exceptions only the last."""
    found: list[Traceback] = []
    lines = [RANK_PREFIX.sub("", line) for line in log.splitlines()]
    i, chained = 0, False
    while i < len(lines):
        if any(mark in lines[i] for mark in CHAINED):
            chained = True
        if not lines[i].startswith("Traceback (most recent call last)"):
            i += 1
            continue
        place, ours = "", ""
        i += 1
        while i < len(lines) and (lines[i].startswith((" ", "\t")) or not lines[i].strip()):
            if frame := FRAME.match(lines[i]):
                place = f"{_short_path(frame[1])}:{frame[2]}"
                if not re.search(r"/(site|dist)-packages/|/lib/python3|^<", frame[1]):
                    ours = place
            i += 1
        if i < len(lines) and ERROR_LINE.match(lines[i]):
            if chained and found:
                found.pop()
            found.append(Traceback(lines[i].strip(), ours or place))
        chained = False
    return found


def _short_path(path: str) -> str:
    """A path inside a code snapshot without the snapshot's folder."""
    return re.sub(r"^.*/submissions/\d+/code/", "", path)
