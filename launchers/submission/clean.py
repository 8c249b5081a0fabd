"""Deletes what nothing needs any more of runs of which nothing is under way: `afterok clean`.

A folder loses its name before it loses its files, so that a kill in between leaves nothing half there under its name;
the next clean deletes the rest. No seal names anything of it (superfluous.py), so each seal stays valid at any moment.
"""

import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.mistake import UserMistake
from data_tools.records import readers
from jobs.artifacts.layout import CLEANED, runs_below
from jobs.artifacts.run_folder import RunFolder
from launchers.backends.choose import backends_of
from launchers.causes.states import ACTIVE_STATES
from launchers.planning.ledger import Ledger
from launchers.submission.lock import submit_lock
from launchers.submission.superfluous import References, Superfluous, superfluous
from slurm.client import SlurmError


@dataclass(frozen=True)
class Item:
    """One file or folder that may go, and what that frees."""

    what: str  # a key of superfluous.WHAT
    phase: str
    path: Path
    size: int  # bytes
    files: int

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` has of it."""
        return {"what": self.what, "phase": self.phase, "path": str(self.path), "bytes": self.size, "files": self.files}


@dataclass
class Cleaned:
    """What may go of one run, or what went."""

    run: RunFolder
    going: str = ""  # why nothing of it may go, or no more of it
    items: list[Item] = field(default_factory=list)
    kept: dict[Path, str] = field(default_factory=dict)  # what stays for a reason that its user may not know
    deleted: bool = False
    unread: dict[Path, str] = field(default_factory=dict)  # runs that may read something of it, which nobody can tell

    @property
    def size(self) -> int:
        """Return the bytes of all items."""
        return sum(item.size for item in self.items)

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` has of the run."""
        return {
            "run": str(self.run.path),
            "going": self.going,
            "deleted": self.deleted,
            "bytes": self.size,
            "items": [item.as_json() for item in self.items],
            "kept": {str(path): why for path, why in self.kept.items()},
            "unread": list(map(str, self.unread)),
        }


def clean(runs: Sequence[RunFolder], only: Iterable[str], delete: bool) -> list[Cleaned]:
    """Return what may go of each run; with `delete`, after it is gone. A run that is going keeps all.

    So does one of which nobody can tell what it needs: its ledger is damaged, or somebody submits to it.

    Raises:
        UserMistake: a plan is damaged, so that nobody can tell what that run reads of any.
    """
    references = References(_others(runs))
    unread = dict.fromkeys(references.unread, "you may not read that run: nobody can tell what of these it reads")
    done = []
    for run in runs:
        done.append(Cleaned(run, unread=unread))
        try:
            _clean(done[-1], references, only, delete)
        except UserMistake as mistake:  # what went before it must be told
            done[-1].going = str(mistake)
    return done


def _clean(cleaned: Cleaned, references: References, only: Iterable[str], delete: bool) -> None:
    """Fill in what may go of one run, or what went.

    Raise UserMistake where nobody can tell what the run needs, or something cannot be deleted.
    """
    cleaned.going = why_going(cleaned.run)
    if cleaned.going or not delete:
        _find(cleaned, references, only)
        return
    with submit_lock(cleaned.run):
        cleaned.going = why_going(cleaned.run)  # it may have been submitted a moment ago
        _find(cleaned, references, only)
        found, cleaned.items, cleaned.deleted = cleaned.items, [], not cleaned.going
        is_told = _write_down(cleaned.run, found)  # before: of a clean that is killed nobody wonders what became of it
        for item in found:
            try:
                remove(item.path)
            except OSError as error:
                raise UserMistake(f"{error.filename or item.path} cannot be deleted: {error.strerror}") from None
            cleaned.items.append(item)
        if not is_told:  # the disk was full, which is why it was cleaned
            _write_down(cleaned.run, found)


def _write_down(run: RunFolder, items: Sequence[Item]) -> bool:
    """Append to the run's own record what is deleted now: {time, items: [[phase, what], …]}. Return whether it is
    there."""
    kinds = sorted({(item.phase, item.what) for item in items})
    try:
        if kinds:
            durable.append_line(run.cleaned, durable.canonical_json({"time": time.time(), "items": kinds}))
    except OSError:
        return False
    return True


def when_cleaned(run: RunFolder, phase: str, what: str) -> float | None:
    """Return when `clean` last deleted things of a kind of a phase, in seconds since the epoch; None where it never
    did."""
    times = []
    for record in readers.records(run.cleaned) if run.cleaned.is_file() else ():
        if isinstance(record.value, dict) and [phase, what] in record.value.get("items", []):
            times.append(float(record.value["time"]))
    return max(times, default=None)


def _others(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Return all runs that may read something of these: these, those beside them, and those below ./runs.

    A folder there that this user may not enter may be a run, too.
    """
    folders = {run.path.parent.resolve() for run in runs} | {Path("runs").resolve()}
    paths = {run.path.resolve() for run in runs}
    for folder in filter(Path.is_dir, folders):
        paths.update(runs_below(folder))
        paths.update(path for path in folder.iterdir() if path.is_dir() and not os.access(path, os.X_OK))
    return [RunFolder(path) for path in sorted(paths)]


def why_going(run: RunFolder) -> str:
    """Return what of a run is under way, or why nobody can tell; "" where nothing is."""
    ledger = Ledger(run.ledger)
    if numbers := ledger.unreleased():
        return f"submission {numbers[-1]} is not finished: `afterok repair {run.path}` or `afterok cancel {run.path}`"
    jobs = {entry.job: entry for entry in ledger.own_jobs()}
    try:
        tasks = [task for backend in backends_of(run).values() for task in backend.states([*jobs.values()])]
    except (SlurmError, UserMistake) as error:
        return f"nobody can tell whether its jobs have ended: {error}"
    active = {f"{jobs[task.job].phase} (job {task.job})": None for task in tasks if task.state in ACTIVE_STATES}
    return f"{', '.join(active)} is under way" if active else ""


def _find(cleaned: Cleaned, references: References, only: Iterable[str]) -> None:
    """Fill in what may go of a run; nothing of one that is going."""
    if not cleaned.going:
        found = superfluous(cleaned.run, references, only)
        cleaned.items, cleaned.kept = [_measured(item) for item in found.items], found.kept


def _measured(item: Superfluous) -> Item:
    """Return an item with its size; a file that has a name elsewhere too frees nothing."""
    names: Counter[tuple[int, int]] = Counter()
    size = files = 0
    if item.path.is_symlink():
        return Item(item.what, item.phase, item.path, size=0, files=1)
    for folder, _, inside in os.walk(item.path):
        for name in inside:
            stat = os.lstat(os.path.join(folder, name))
            files += 1
            names[stat.st_dev, stat.st_ino] += 1
            size += stat.st_size if names[stat.st_dev, stat.st_ino] == stat.st_nlink else 0
    return Item(item.what, item.phase, item.path, size, files)


def remove(path: Path) -> None:
    """Delete a folder, or what a clean before left of one; of a link the link alone."""
    doomed = path
    if not path.name.startswith(CLEANED):
        doomed = path.with_name(f"{CLEANED}{path.name}.{uuid.uuid4().hex[:8]}")
        path.rename(doomed)
        durable.fsync_folder(path.parent)
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()
