"""Finds what lies in a run that nothing needs any more: for `afterok clean`.

Needed is what a seal names, what the newest submission would go on from, and what a plan or a link leads to, of this
run or of another. In doubt a thing stays: where a seal is damaged, or nobody can tell whether a worker has ended.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.mistake import UserMistake
from jobs.artifacts.artifact import Artifact
from jobs.artifacts.layout import CLEANED, durable_checkpoints_of, journals_of, read_lease_name
from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.kind import find_kind
from launchers.planning.ledger import Ledger

WHAT = {
    "attempts": "what attempts wrote and never sealed",
    "settings": "unsealed phases under settings that the newest submission, and the newest that ran, have no more",
    "milestones": "checkpoints of sealed trainings, but for the newest (keep_checkpoints)",
    "journals": "what sealed phases wrote down while they sampled, to go on after a stop",
    "retired": "what `resubmit --again` set aside, of phases that are sealed again",
    "code": "code and scripts of submissions that no seal names",
    "leftovers": "what a clean that was killed had begun to delete",
    "superseded": "sealed phases under settings that the newest submission, and the newest that ran, have no more",
}
BY_NAME_ONLY = ("superseded",)  # what may be wanted again, and goes only where --only names it
LINK_DEPTH = 3  # folders down from a run's, in which links of its are seen


@dataclass(frozen=True)
class Superfluous:
    """One file or folder that may go."""

    what: str  # a key of WHAT
    phase: str  # "" of what belongs to a submission
    path: Path


@dataclass
class Found:
    """What may go of a run, and what stays for a reason that its user may not know."""

    items: list[Superfluous] = field(default_factory=list)
    kept: dict[Path, str] = field(default_factory=dict)


class References:
    """The places that the plans of some runs, and the links in them, lead to."""

    def __init__(self, runs: Iterable[RunFolder]):
        self._readers: dict[str, str] = {}  # real path -> who reads it
        self.unread: list[Path] = []  # runs of others that this user may not read
        for run in runs:
            try:
                places = [*_named(run), *_linked(run)]
            except PermissionError:
                self.unread.append(run.path)
                continue
            for place in places:
                self._readers.setdefault(os.path.realpath(place), str(run.path))

    def reader_of(self, path: Path) -> str:
        """Return which run reads a path or something below it; "" where none does."""
        real = os.path.realpath(path)
        below = real + os.sep
        return next((who for place, who in self._readers.items() if place == real or place.startswith(below)), "")


def _named(run: RunFolder) -> set[str]:
    """Return the absolute paths that the settings and inputs of a run's submissions name."""
    paths = set[str]()
    for number in run.submissions():
        try:
            folder = durable.read_checked(run.pipeline_origin_path(number))["cwd"]
        except (OSError, durable.TornFile, KeyError):  # a run of before, or a torn file: what it names is absolute
            folder = os.sep
        for phase in run.frozen(number).values():
            for text in [*_texts(phase.settings), *_texts(phase.array), *phase.inputs]:
                if os.sep in text and "@{" not in text:
                    paths.add(os.path.join(folder, os.path.expanduser(text)))
    return paths


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a setting, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for element in value.values() if isinstance(value, dict) else value:
            yield from _texts(element)


def _linked(run: RunFolder) -> Iterator[str]:
    """Yield the links in the upper folders of a run, and those that lie beside it."""
    folders = [str(run.path)]
    yield from (entry.path for entry in os.scandir(run.path.parent) if entry.is_symlink())
    for _ in range(LINK_DEPTH):
        below: list[str] = []
        for folder in folders:
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:  # gone since, as its links are
                for entry in entries:
                    if entry.is_symlink():
                        if not run.is_own_link(Path(entry.path)):
                            yield entry.path
                    elif entry.is_dir():
                        below.append(entry.path)
        folders = below


def superfluous(run: RunFolder, references: References, only: Iterable[str] = ()) -> Found:
    """Return what may go of a run of which no job is under way: of the kinds `only`, else of all but BY_NAME_ONLY.

    Raises:
        UserMistake: nothing was submitted there, or a plan or the ledger is damaged.
    """
    asked = set(only) or set(WHAT) - set(BY_NAME_ONLY)
    finder = _Finder(run, references, asked)
    finder.look()
    finder.found.items = [item for item in finder.found.items if item.what in asked]
    return finder.found


class _Finder:
    """Looks through one run, artifact by artifact."""

    def __init__(self, run: RunFolder, references: References, asked: set[str]):
        self.run, self.references, self.asked, self.found = run, references, asked, Found()
        self.newest = run.frozen(run.newest_submission())
        self.frozen = {  # as the newest submission that had the key
            (name, phase.key): phase for number in run.submissions() for name, phase in run.frozen(number).items()
        }
        self.ledger = Ledger(run.ledger)
        # Whoever took a submission back, or has not sent its bundle, goes on from what the one before had.
        ran = {number for number in (self.ledger.newest_released(),) if number in run.submissions()}
        self.current = {
            (name, phase.key) for frozen in [self.newest, *map(run.frozen, ran)] for name, phase in frozen.items()
        }
        self.jobs = {entry.job for entry in self.ledger.jobs()}  # none of which is under way
        self.outcomes = {  # hosts on which a life of an element told how it ended
            (name, (told.element, told.attempt, told.restart)): told.host
            for name in {name for name, _ in self.frozen}
            for told in run.outcomes(name)
        }
        self.sealed_by: set[int] = set()  # submissions that seals name
        self.all_seals_read = True

    def look(self) -> None:
        """Find all that may go."""
        for folder in sorted(self.run.artifact_folders()):
            phase = self.frozen.get((folder.parent.name, folder.name))
            if phase is None:
                self.found.kept[folder] = "no submission tells what it is"
                self._read_seals(Artifact(folder))
            else:
                self._artifact(phase)
        for folder in sorted(self.run.retired_folders()):
            self._retired(folder)
        for name in sorted({name for name, _ in self.frozen}):
            self._leftovers(self.run.phase_folder(name), name)
        self._code()

    def _add(self, what: str, phase: str, path: Path) -> None:
        """Add something, unless a run reads it."""
        reader = self.references.reader_of(path)
        if reader:
            self.found.kept[path] = f"{reader} reads it"
        else:
            self.found.items.append(Superfluous(what, phase, path))

    def _leftovers(self, folder: Path, phase: str) -> None:
        self.found.items += [Superfluous("leftovers", phase, path) for path in sorted(folder.glob(f"{CLEANED}*"))]

    # -- one PHASE/KEY folder --------------------------------------------------------------------------------------

    def _artifact(self, phase: FrozenPhase) -> None:
        artifact = self.run.artifact(phase)
        roots = self._read_seals(artifact)
        if roots is None:
            self.found.kept[artifact.folder] = "a seal in it is damaged: nobody can tell what it names"
            return
        abandoned = (phase.name, phase.key) not in self.current
        is_sealed = any(artifact.all_seals())
        if abandoned and (not is_sealed or "superseded" in self.asked):
            at_work = next(filter(None, (self._why_at_work(lease, phase.name) for lease in artifact.all_leases())), "")
            if at_work:
                self.found.kept[artifact.folder] = at_work
            else:
                self._add("superseded" if is_sealed else "settings", phase.name, artifact.folder)
            return
        for folder, lease in [*artifact.all_work_folders(), *artifact.all_sealing_folders()]:
            if folder.name in roots:
                continue
            if why := self._why_at_work(lease, phase.name):
                self.found.kept[folder] = why
            else:
                self._add("attempts", phase.name, folder)
        for below in artifact.owners_folders():
            self._leftovers(below, phase.name)
        if self.run.whole_seal(phase.name, phase.key) is not None and "." not in phase.uses:
            self._kept_by_elements(artifact, phase)

    def _read_seals(self, artifact: Artifact) -> set[str] | None:
        """Return the folders of an artifact that its seals name, None where one is damaged; note their submissions.

        Those of seals that speak of other results upstream are swept by the next owner, too (Artifact.sweep).
        """
        roots = set[str]()
        for path in artifact.all_seals():
            try:
                told = durable.read_checked(path)
                self.sealed_by.add(int(told.get("submission", 0)))
                if ".retired." not in path.name:
                    roots.add(Path(told["root"]).name)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                self.all_seals_read = False
                return None
        return roots

    def _why_at_work(self, lease: Path, phase: str) -> str:
        """Return why the owner of a lease may be at work still; "" where it has ended."""
        named = read_lease_name(lease.name)
        assert named is not None
        element, owner = named
        try:
            holder = Owner.read(lease)
        except FileNotFoundError:
            return f"{lease} is gone: nobody can tell who wrote it"
        if holder is None:
            return f"{lease} is torn: nobody can tell whether its worker has ended"
        if holder.is_dead(lambda job: job.partition("_")[0] in self.jobs):
            return ""
        life = int(element) if element.isdigit() else -1, owner.attempt, owner.restart
        if not holder.is_here and self.outcomes.get((phase, life)) == holder.host:
            return ""
        return f"process {holder.pid} on {holder.host} may be at work on it"

    def _kept_by_elements(self, artifact: Artifact, phase: FrozenPhase) -> None:
        """Add what the elements of a sealed phase kept to go on from; none of it where a run reads the artifact."""
        reader = self.references.reader_of(artifact.folder)
        keep = _keep_checkpoints(phase)
        for kept in artifact.keep_folders():
            steps = sorted(durable_checkpoints_of(kept), key=_step_of)
            old = [manifest.parent for manifest in steps[: -keep or None]] if keep else []
            self._leftovers(kept, phase.name)
            self._leftovers(kept / "checkpoints", phase.name)
            for what, paths in (("milestones", old), ("journals", journals_of(kept))):
                for path in paths:
                    if reader:
                        self.found.kept[path] = f"{reader} reads {artifact.folder}"
                    else:
                        self._add(what, phase.name, path)

    # -- the rest --------------------------------------------------------------------------------------------------

    def _retired(self, folder: Path) -> None:
        phase, key = folder.parents[1].name, folder.name.rpartition(".")[0]
        if folder.name.startswith(CLEANED):
            self.found.items.append(Superfluous("leftovers", phase, folder))
        elif self.run.whole_seal(phase, key) is None:
            self.found.kept[folder] = f"{phase} was not sealed again under its settings"
        else:
            self._add("retired", phase, folder)

    def _code(self) -> None:
        """Add the code and scripts of submissions that no seal names, and whose jobs nobody can ask about any more."""
        if not self.all_seals_read:
            return
        newest_jobs = {  # of each element that is not sealed, which `why` speaks of
            (entry.phase, element): entry.scripted
            for entry in self.ledger.jobs()
            if (entry.phase, entry.key) in self.current and self.run.whole_seal(entry.phase, entry.key) is None
            for element in entry.elements
        }
        needed = {self.run.newest_submission(), *self.sealed_by, *newest_jobs.values()}
        for number in self.run.submission_numbers():
            self._leftovers(self.run.submission_folder(number), "")
            if number in needed or self.ledger.unsent(number):
                continue
            for path in (self.run.code_folder(number), self.run.script_path(number, "").parent):
                if path.is_dir():
                    self._add("code", "", path)
        self._shared_code()

    def _shared_code(self) -> None:
        """Add the copies of code that only submissions run whose link to them goes, or that none has a link to."""
        going = {item.path for item in self.found.items}
        folders = {self.run.code_folder(number) for number in self.run.submission_numbers()}
        linked = {folder.resolve() for folder in folders - going}
        shared = self.run.shared_code_folder
        self._leftovers(shared, "")
        for copy in sorted(shared.glob("[!.]*")):
            if copy.resolve() not in linked:
                self._add("code", "", copy)


def _step_of(manifest: Path) -> int:
    number = manifest.parent.name.removeprefix("step_")
    return int(number) if number.isdigit() else -1


def _keep_checkpoints(phase: FrozenPhase) -> int:
    """Return how many of its newest checkpoints a training keeps; 0 of a kind without that setting."""
    try:
        kind = find_kind(phase.uses)
    except UserMistake:
        kind = None
    default = getattr(kind.config, "keep_checkpoints", 0) if kind is not None else 0
    return int(phase.settings.get("keep_checkpoints", default)) if default else 0
