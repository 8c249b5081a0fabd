"""Reads the lines of a log: the words of Slurm and PyTorch for an end, the rank that died first, and tracebacks.

The words looked for are those of Slurm 22.05's srun and slurmstepd, PyTorch 2, NCCL 2 and vLLM 0.32. They stand in
tests/launchers/test_diagnosis.py, seen on the dev cluster or written from those programs' known wording.
"""

import re
from dataclasses import dataclass

from data_tools.progress import ENGINE_DIED, HUNG
from jobs.health import FAILED_ON

PREEMPTED_LINE = re.compile(r"DUE TO PREEMPTION")
TIME_LINE = re.compile(r"DUE TO TIME LIMIT")
LAUNCH_LINE = re.compile(r"Task launch for \S+ failed on node", re.IGNORECASE)
NODE_LINE = re.compile(
    rf"DUE TO NODE FAILURE|Node failure on \S+|{FAILED_ON}|launch failed on node|{LAUNCH_LINE.pattern}|\bNODE_FAIL\b",
    re.IGNORECASE,
)
CANCELLED_LINE = re.compile(r"slurmstepd.*: error: \*\*\* (JOB|STEP) \S+ ON \S+ CANCELLED AT (?!.* DUE TO )")
GPU_MEMORY_LINE = re.compile(
    r"torch(\.cuda)?\.OutOfMemoryError|\bOutOfMemoryError: |(CUDA|HIP) out of memory|CUDA error: out of memory"
    r"|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED"
)
ENGINE_MEMORY_LINE = re.compile(  # vLLM 0.32's, of an engine in a process of its own
    r"No available memory for the cache blocks|larger than the available KV cache"
    r"|is less than desired [CG]PU memory utilization"
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
ENGINE_LINE = re.compile(rf"EngineDied: {re.escape(ENGINE_DIED)}")
ENDED = "ended the job with code"  # what the lines of launchers/backends/shell_lines.py say of themselves
ENVIRONMENT_LINE = re.compile(rf"^afterok: profile .*: ((?:env|hooks)\.\w+) {re.escape(ENDED)} \d+")
NODE_NAMES = re.compile(r"Node failure on ([\w.-]+)|failed on node ([\w.-]+)")
KILLED_TASK = re.compile(r"Killed|Segmentation fault|Aborted|Bus error|Illegal instruction", re.IGNORECASE)
TASK_LINE = re.compile(r"srun: error: ([\w.-]+): tasks? ([\d,-]+): (.+)")


def first_dead_task(log: str) -> tuple[str, str, str]:
    """Return (line, node, how) of the rank that srun saw end first: those after it were ended because of it."""
    for line in log.splitlines():
        if match := TASK_LINE.search(line):
            return line.strip(), match[1], match[3]
    return "", "", ""


# -- tracebacks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traceback:
    """One traceback of a log."""

    error: str  # its last line: "module.Error: text"
    place: str  # file:line of the innermost frame outside installed packages


FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+)')
ERROR_LINE = re.compile(r"^[A-Za-z_][\w.]*(:.*)?$")
RANK_PREFIX = re.compile(r"^(?:\[rank\d+\]:\s?|\s*\d+: )")  # torch's, and srun --label's
CHAINED = "The above exception was the direct cause", "During handling of the above exception"


def tracebacks(log: str) -> list[Traceback]:
    """Return Python's tracebacks in a log, in order; of a chain of exceptions only the last."""
    blocks: list[Traceback] = []
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
            if chained and blocks:
                blocks.pop()
            blocks.append(Traceback(lines[i].strip(), ours or place))
        chained = False
    return blocks


def _short_path(path: str) -> str:
    """Return a path inside a code snapshot without the snapshot's folder."""
    return re.sub(r"^.*/submissions/(\d+/code|code/[\w.]+)/", "", path)
