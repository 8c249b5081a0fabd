"""Know, signal and await a process for sure, whoever started it."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILL_LIMIT_S = 10.0


@dataclass(frozen=True)
class Process:
    """Names one process for ever: a pid may be reused, a pid with its start time may not."""

    pid: int
    started: int  # clock ticks since boot

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """Return the process now under `pid`; None when there is none or only a zombie (pid 1 of a container may not
        reap).
        """
        try:
            # the name in parentheses may hold anything; fields after it: state is 0, starttime 19 (proc(5))
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def send(self, sig: int) -> None:
        """Signal it unless it is gone; the pidfd pins the pid between the comparison and the signal."""
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(self.pid)
            try:
                if Process.of(self.pid) == self:
                    signal.pidfd_send_signal(handle, sig)
            finally:
                os.close(handle)


_children: list[subprocess.Popen[Any]] = []  # started by this process, to be reaped when they end


def spawn(command: Sequence[str], **options: Any) -> Process:
    """Start a command (`options` are those of Popen); it is reaped here once it has ended."""
    child = subprocess.Popen(command, **options)
    _children.append(child)
    return Process.of(child.pid) or Process(child.pid, 0)  # 0: died before it could be looked at


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def ancestors() -> set[int]:
    """Return the pids of this process and of those above it."""
    pids, pid = {os.getpid()}, os.getpid()
    while pid > 1:
        pid = parent(pid)
        pids.add(pid)
    return pids


def gone(processes: list[Process], limit_s: float) -> bool:
    """Wait until all have ended; return whether they did within the limit."""
    _children[:] = [child for child in _children if child.poll() is None]
    deadline = time.monotonic() + limit_s
    while any(process.alive() for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def end(processes: list[Process]) -> None:
    """Kill them, and wait until they are gone."""
    for process in processes:
        process.send(signal.SIGKILL)
    gone(processes, KILL_LIMIT_S)
