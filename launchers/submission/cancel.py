"""Cancelling the active jobs of a run, and taking back a submission that was never released."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from data_tools.mistake import UserMistake, disk_problem, nearest
from jobs.artifacts.run_folder import RunFolder
from launchers.backends.choose import backends_of
from launchers.backends.contract import Backend
from launchers.planning.ledger import Ledger
from launchers.submission.carry_out import abandon
from launchers.submission.live import live_jobs
from launchers.submission.lock import submit_lock_if_writable
from launchers.submission.repair import close_unwritten


@dataclass
class Cancelled:
    """What a cancel did: the jobs it ended, and what a user has to know besides."""

    jobs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def cancel(run: RunFolder, phases: Iterable[str] | None = None) -> Cancelled:
    """Cancel the active jobs of a run, or of some of its phases, and take back a submission that was never released.

    The jobs end first and are written down then: a file system that takes no more writes keeps nothing running.

    Raises:
        UserMistake: a phase that was never submitted.
    """
    ledger, asked = Ledger(run.ledger), set(phases or [])
    planned = {entry.phase for entry in ledger.jobs()} | {name for n in ledger.unreleased() for name in _phases(run, n)}
    if unknown := asked - planned:
        name = sorted(unknown)[0]
        raise UserMistake(f"{run.path} never submitted a phase {name!r}{nearest(name, sorted(planned))}")
    backends, done = backends_of(run), Cancelled()
    _take_back_unreleased(run, asked, backends, done)
    live = live_jobs(run, backends.values())
    entries = [job.entry for phase, job in live.items() if not asked or phase in asked]
    by_choice: dict[str, list[str]] = {}
    for entry in entries:  # an id means one thing on each cluster
        by_choice.setdefault(ledger.backend(entry.scripted)["choice"], []).append(entry.job)
    for choice, jobs in by_choice.items():
        backends[choice].cancel(jobs)
    ended = [entry.job for entry in entries if entry.job not in done.jobs]
    if ended:
        done.jobs += ended
        _write_down(done, lambda: ledger.append("cancel", jobs=ended))
    return done


def _take_back_unreleased(run: RunFolder, asked: set[str], backends: dict[str, Backend], done: Cancelled) -> None:
    """Take back the submissions that were never released and have one of the phases `asked`; all where it is empty."""

    def unreleased() -> list[int]:
        """Return the submissions meant; the lock is taken only where there is one."""
        return [n for n in Ledger(run.ledger).unreleased() if not asked or asked & set(_phases(run, n))]

    if not unreleased():
        return
    with submit_lock_if_writable(run):
        for number in unreleased():
            _write_down(done, functools.partial(_abandon_begun, run, number, backends=backends, done=done))
            done.notes.append(f"submission {number} was never released: taken back")


def _abandon_begun(run: RunFolder, number: int, backends: dict[str, Backend], done: Cancelled) -> None:
    """Abandon a submission that was begun; the jobs cancelled are added to `done`."""
    if run.journal_path(number).exists():
        done.jobs += abandon(run, number, backends[Ledger(run.ledger).backend(number)["choice"]], "cancelled")
    else:
        close_unwritten(run, number)


def _write_down(done: Cancelled, call: Callable[[], None]) -> None:
    """Make a call that cancels and writes last; where the file system refuses the writing, a note says so."""
    try:
        call()
    except OSError as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        done.notes.append(f"the jobs are cancelled, and it could not be written down: {problem}")


def _phases(run: RunFolder, number: int) -> list[str]:
    """Return the phases of a submission, none where it was killed before they were written."""
    try:
        return list(run.frozen(number))
    except UserMistake:
        return []
