"""Notices that training no longer moves: stacks of all ranks, then an exit that `afterok why` knows.

A rank that waits in a collective cannot see who it waits for; its stack and those of the others together do. A thread
on every rank compares the time since the last step with the median of those before. If training stands still, every
rank writes its stacks to its log and into KEEP/stacks/, waits a moment for the others to do so, and exits EXIT_HUNG.
Where not even that thread runs (a C function that never gives Python's lock back), faulthandler's own, which needs no
lock, writes the stacks and exits with 1.
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from data_tools.base.declared import setting
from data_tools.progress import EXIT_HUNG, HUNG

REMEMBERED = 101  # steps, for the median
LOOKS = 20  # within the shortest time that counts as a hang


@dataclass
class Hang:
    """When training counts as hung."""

    times: float = setting(
        20.0, "no step for so many times the median of the last ones is a hang; 0: never", least=2, also=[0]
    )
    floor_s: float = setting(600.0, "it is called a hang no earlier than this, the first step too", unit="s", above=0)
    grace_s: float = setting(
        10.0, "time from a rank's stacks to its exit, in which the others write theirs", unit="s", above=0
    )


class Watch:
    """Watches one rank inside `watching`; `step` says that it moves."""

    def __init__(self, hang: Hang, folder: Path, rank: int):
        self.hang, self.folder, self.rank = hang, folder, rank
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._since = time.monotonic()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._log = os.dup(sys.stderr.fileno()) if _has_descriptor(sys.stderr) else None

    @contextmanager
    def watching(self) -> Iterator["Watch"]:
        """Watch this rank meanwhile."""
        if self.hang.times:
            self._since = time.monotonic()
            self._thread = threading.Thread(target=self._look, name="hang watch", daemon=True)
            self._thread.start()
        try:
            yield self
        finally:
            self._done.set()
            if self._thread is not None:
                self._thread.join()
                faulthandler.cancel_dump_traceback_later()

    def step(self) -> None:
        """Hear that a step is done."""
        now = time.monotonic()
        self._steps.append(now - self._since)
        self._since = now

    def move(self) -> None:
        """Hear that something else is done which takes longer than a step: a checkpoint, a validation."""
        self._since = time.monotonic()

    def limit(self) -> float:
        """Return the seconds without a step that count as a hang."""
        usual = statistics.median(self._steps) if self._steps else 0.0
        return max(self.hang.floor_s, self.hang.times * usual)

    def _look(self) -> None:
        while not self._done.wait(self.hang.floor_s / LOOKS):
            if self._log is not None:
                # Put off at every look: it fires only if this thread no longer runs.
                faulthandler.dump_traceback_later(self.limit() + 2 * self.hang.grace_s, exit=True, file=self._log)
            still = time.monotonic() - self._since
            if still > self.limit():
                self._report(still)

    def _report(self, still: float) -> None:
        usual = f", where {statistics.median(self._steps):.3g} s are usual" if self._steps else ", not even the first"
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank_{self.rank}.txt"
        with open(path, "w") as file:
            faulthandler.dump_traceback(file)
        line = f"{HUNG} {still:.0f} s on rank {self.rank}{usual}; its stacks are in {path}"
        if self._log is not None:
            os.write(self._log, f"{line}\n{path.read_text()}\n".encode())
        time.sleep(self.hang.grace_s)
        os._exit(EXIT_HUNG)


def _has_descriptor(stream: TextIO) -> bool:
    """Return whether a stream is a file, and not a test's capture or closed."""
    try:
        return stream.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False
