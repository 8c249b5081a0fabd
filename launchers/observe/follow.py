"""Watches a run until it ends: a live table on a terminal, plain lines of change in a log."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data_tools.base.printing import set_in
from jobs.artifacts.run_folder import RunFolder
from launchers.causes.states import COMPLETED, NO_SEAL, UNKNOWN
from launchers.causes.waiting import remedy_if_stuck
from launchers.observe.show import console, format_seconds, progress_text, status_table
from launchers.observe.status import PhaseStatus, RunStatus, run_status
from launchers.planning.ledger import Ledger

LOCAL_POLL_S = SLURM_POLL_S = 2.0  # a look at a run of tens of phases takes tens of milliseconds
NEWS_POLL_S = 0.1
PROGRESS_LINE_S = 15.0  # between two progress lines of one phase in a plain log
SETTLE_S = 10.0  # how long a job may be gone before its seal must be visible: shared filesystems lag


def poll_interval(run: RunFolder) -> float:
    """Return the seconds between two looks at a run: a queue is asked less often than a file."""
    slurm = any(event["event"] == "submission" and event["backend"] == "slurm" for event in Ledger(run.ledger).events())
    return SLURM_POLL_S if slurm else LOCAL_POLL_S


def follow(run: RunFolder, poll_s: float = LOCAL_POLL_S, quiet: bool = False) -> RunStatus:
    """Return the last status, once nothing is active any more. KeyboardInterrupt is the caller's."""
    if sys.stdout.isatty() and not quiet:
        from rich.live import Live

        with Live(console=console(), refresh_per_second=4, transient=True) as live:
            return _watch(run, poll_s, lambda status: live.update(status_table(status)))
    lines = _Lines(quiet)
    return _watch(run, poll_s, lines.show)


def _watch(run: RunFolder, poll_s: float, show: Callable[[RunStatus], None]) -> RunStatus:
    """Look at a run every `poll_s` seconds and show it, until it has ended and its seals had time to appear."""
    ended_since: float | None = None
    while True:
        status = run_status(run)
        show(status)
        if status.finished:
            return status
        if not status.active and not status.may_answer:
            ended_since = ended_since or time.monotonic()
            undecided = any(p.state == UNKNOWN or p.reason == NO_SEAL for p in status.phases)
            if not undecided or time.monotonic() - ended_since > SETTLE_S:
                return status
        else:
            ended_since = None
        _wait_for_news(run, poll_s)


def _wait_for_news(run: RunFolder, longest_s: float) -> None:
    """Return when a local driver has written something, at the latest after `longest_s` seconds."""
    end, last = time.monotonic() + longest_s, _written(run)
    while (left_s := end - time.monotonic()) > 0 and _written(run) == last:
        time.sleep(min(NEWS_POLL_S, left_s))


def _written(run: RunFolder) -> list[tuple[Path, int, int]]:
    """Return the files of state of the run's local drivers, each with what a write of it changes."""
    found = []
    for path in run.local_files("state.json"):
        with suppress(OSError):
            found.append((path, path.stat().st_ino, path.stat().st_mtime_ns))
    return found


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
