"""Watches a run until it ends: a live table on a terminal, plain lines of change in a log."""

import sys
import time
from collections.abc import Callable

from data_tools.base.printing import set_in
from jobs.artifacts.run_folder import RunFolder
from launchers.causes.states import COMPLETED, NO_SEAL, UNKNOWN
from launchers.causes.waiting import remedy_if_stuck
from launchers.observe.runs import last_change
from launchers.observe.show import console, format_seconds, progress_text, status_table
from launchers.observe.status import PhaseStatus, RunStatus, run_status

POLL_S = 2.0  # between two looks at a run of which nothing is heard
FILES_POLL_S = 0.25  # between two looks at whether a file of the run has changed, after which the queue is asked sooner
PROGRESS_LINE_S = 15.0  # between two progress lines of one phase in a plain log
LAST_WORDS_S = 0.5  # how long after its seal a worker may write down how it ended, from which GPU-hours are told
SETTLE_S = 10.0  # how long a job may be gone before its seal must be visible: shared filesystems lag


def follow(run: RunFolder, quiet: bool = False) -> RunStatus:
    """Return the last status, once nothing is active any more. KeyboardInterrupt is the caller's."""
    if sys.stdout.isatty() and not quiet:
        from rich.live import Live

        with Live(console=console(), refresh_per_second=4, transient=True) as live:
            return _watch(run, lambda status: live.update(status_table(status)))
    lines = _Lines(quiet)
    return _watch(run, lines.show)


def _watch(run: RunFolder, show: Callable[[RunStatus], None]) -> RunStatus:
    """Look at a run every POLL_S seconds and show it, until it has ended and its seals had time to appear.

    A change of the run's files is seen at once. The queue may tell of it a moment later, so that the next looks follow
    soon, and then less and less so.
    """
    ended_since: float | None = None
    pause_s = POLL_S
    while True:
        changed = last_change(run)
        status = run_status(run)
        show(status)
        if status.finished:
            if _changes(run, changed, LAST_WORDS_S):
                continue
            return status
        if not status.active and not status.may_answer:
            ended_since = ended_since or time.monotonic()
            undecided = any(p.state == UNKNOWN or p.reason == NO_SEAL for p in status.phases)
            if not undecided or time.monotonic() - ended_since > SETTLE_S:
                return status
        else:
            ended_since = None
        pause_s = FILES_POLL_S if _changes(run, changed, pause_s) else min(2 * pause_s, POLL_S)


def _changes(run: RunFolder, changed: float, limit_s: float) -> bool:
    """Wait until a run has changed since `changed`; return False where it did not within `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while last_change(run) <= changed:
        if (left_s := deadline - time.monotonic()) <= 0:
            return False
        time.sleep(min(FILES_POLL_S, left_s))
    return True


class _Lines:
    """Prints a plain line at each change of state or of what keeps a job from starting, and some of progress."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.said: dict[str, tuple[str, str]] = {}
        self.progress_at: dict[str, float] = {}

    def show(self, status: RunStatus) -> None:
        """Print what has changed since the last status."""
        for phase in status.phases:
            if self.quiet:
                continue
            now = phase.state, remedy_if_stuck(phase.reason)
            if self.said.get(phase.phase) != now:
                self.said[phase.phase] = now
                print(f"{time.strftime('%H:%M:%S')} {phase.phase}: {phase.state}{self._detail(phase)}", flush=True)
            elif phase.progress and time.monotonic() - self.progress_at.get(phase.phase, 0) > PROGRESS_LINE_S:
                self.progress_at[phase.phase] = time.monotonic()
                print(f"{time.strftime('%H:%M:%S')} {phase.phase}: {progress_text(phase)}", flush=True)

    @staticmethod
    def _detail(phase: PhaseStatus) -> str:
        if phase.state == COMPLETED:
            return f" in {format_seconds(phase.seconds)}"
        text = ": ".join(filter(None, [phase.message or phase.reason, remedy_if_stuck(phase.reason)]))
        return f" ({set_in(text)})" if text else ""
