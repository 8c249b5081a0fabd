"""Recognizes ends of the code itself: an exception, a signal, a rank that stood still, a collective that broke."""

import signal

from data_tools.progress import EXIT_HUNG
from jobs.retry import SIGNAL_BASE, Cause
from launchers.causes.evidence import SIGNAL_NO_OUTPUT, Diagnosis, Evidence, exit_code_of
from launchers.causes.log_lines import COLLECTIVE_LINE, ENGINE_LINE, HUNG_LINE, KILLED_TASK, first_dead_task, tracebacks
from launchers.causes.memory import host_memory
from launchers.causes.states import CANCELLED

LAST_SIGNAL = 64  # of Linux: SIGRTMAX


def exception(e: Evidence) -> Diagnosis | None:
    """Tell of an exception other than a broken collective: the worker's last word, or another rank's in the log."""
    blocks = [block for block in tracebacks(e.log) if not COLLECTIVE_LINE.search(block.error)]
    if e.outcome is not None and e.outcome.state == "failed" and e.message and not COLLECTIVE_LINE.search(e.message):
        place = next((block.place for block in blocks if _same_error(block.error, e.message)), "")
        return _raised(e, e.message, place)
    dead, _, how = first_dead_task(e.log)
    if blocks and not (dead and KILLED_TASK.search(how)):
        return _raised(e, blocks[0].error, blocks[0].place)
    return None


def _raised(e: Evidence, error: str, place: str) -> Diagnosis:
    """Return the diagnosis of an exception; `place` is the file and line that raised it, "" where unknown."""
    return Diagnosis(
        Cause.CODE,
        "raised an exception" + (f" at {place}" if place else ""),
        error,
        f"correct the code and submit again; the traceback is in {e.log_name}",
    )


def _same_error(error: str, message: str) -> bool:
    """Return whether a traceback's last line is the exception of the worker's message, which leaves its module out."""
    return (
        error.rpartition(".")[2].startswith(message.partition(":")[0])
        or message.partition(":")[0] in error.partition(":")[0]
    )


def killed(e: Evidence) -> Diagnosis | None:
    """Tell of a process that a signal ended: what srun says of the first, else the exit code."""
    if e.state == CANCELLED:
        return None
    line, node, how = first_dead_task(e.log)
    number = _signal_of(e)
    if (line and not KILLED_TASK.search(how)) or not (line or number):
        return None
    if e.outcome is not None and not line and number != signal.SIGKILL:
        return None  # its own last word tells more than the signal that a peer sent it
    slurm_tells = e.row is not None and e.row.exit_signal
    code = f"exit code 0:{number}" if slurm_tells else f"exit code {SIGNAL_BASE + number}"
    if number == signal.SIGKILL or how.startswith("Killed"):
        return host_memory(e, line or code, certain=False)
    if e.find(COLLECTIVE_LINE):  # NCCL's watchdog ends its process with SIGABRT
        return None
    return Diagnosis(
        Cause.CODE,
        f"crashed with {_signal_name(number) or how}" + (f" on {node}" if node else ""),
        line or code,
        f"see the last lines of {e.log_name}",
        node=node,
    )


def _signal_of(e: Evidence) -> int:
    """Return the signal that ended a process, as its exit code or Slurm tells it; 0 where none did."""
    code = e.exit_code
    if code is None and e.row is not None:
        code = exit_code_of(e.row)
    if code is not None and SIGNAL_BASE < code <= SIGNAL_BASE + LAST_SIGNAL:
        return code - SIGNAL_BASE
    if e.row is not None and e.row.exit_signal != SIGNAL_NO_OUTPUT:
        return e.row.exit_signal
    return 0


def _signal_name(number: int) -> str:
    """Return SIGSEGV and the like, "" for 0."""
    try:
        return signal.Signals(number).name if number else ""
    except ValueError:
        return f"signal {number}"


def engine_died(e: Evidence) -> Diagnosis | None:
    """Tell of an element whose sampling engine, in processes of its own, ended."""
    line = e.message if e.message and ENGINE_LINE.search(e.message) else e.find(ENGINE_LINE)
    if not line:
        return None
    return Diagnosis(
        Cause.ENGINE,
        "lost its sampling engine",
        line,
        f"see what the engine's own processes said in {e.log_name}; what was sampled is kept",
    )


def hung(e: Evidence) -> Diagnosis | None:
    """Tell of a rank that saw itself make no progress."""
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


def collective(e: Evidence) -> Diagnosis | None:
    """Tell of a rank that waited in vain for its peers."""
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
