"""Leases, element seals, fan-in and seals: how a phase's work becomes an artifact, exactly once.

Where the files lie says jobs/artifacts/layout.py. A folder belongs to one owner only, so a late twin can never touch
what another one sealed; seals and leases are created by link(2), so one of many wins. Attempts and restart counts order
owners, and they are read from the lease's name, so that its content may be torn; no decision compares clocks.

A seal is set aside (seal.json.retired.a3: it speaks of other upstream results; .altered.a3: what it names is not what
was sealed) by the submitter whose plan said so, or by the owner of a later submission who makes a new one. A late
start of the submission that sealed, or of an older one, never does.
"""

import contextlib
import errno
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.base import digests, durable
from data_tools.base.digests import Part
from jobs.artifacts.layout import (
    FINISH,
    ArtifactLayout,
    LeaseName,
    altered_seals,
    element_name,
    set_aside_name,
)
from jobs.artifacts.owner import Owner
from jobs.artifacts.seal import EMPTY, FORMAT, Seal, environment, manifest, read_seal

ASKED_FIRST = 64  # elements of a phase, before all are listed: at a random moment one in 65 goes on to that


class LeaseHeld(Exception):
    """Another owner works on this element, or newer; this one has nothing to do."""


class Sealed(Exception):
    """The element or phase is sealed already; this owner has nothing to do."""


@dataclass(frozen=True)
class Lease:
    """The right to work on an element: that of the newest owner, until a newer one takes it over."""

    path: Path
    owner: LeaseName
    folder: Path  # this owner's own folder, empty
    element: str
    sealing: Path  # its seal is written here first; removed by the owner that takes over


class Artifact(ArtifactLayout):
    """One PHASE/KEY folder of a run, with `elements` parts (1 for a phase that is not split)."""

    def __init__(self, folder: Path, elements: int = 1, fans_in: bool = False):
        super().__init__(folder)
        self.elements, self.fans_in = elements, fans_in

    def all_are_sealed(self) -> bool:
        """Return whether each element has a seal of its own. Thousands ask, and nearly all of them in vain.

        So a few are asked for first, and the folder of all is listed where those are there.
        """
        few = random.sample(range(self.elements), min(self.elements, ASKED_FIRST))
        if not all(self.element_seal_path(i).exists() for i in few):
            return False
        return self.sealed_elements().issuperset(range(self.elements))

    def acquire(
        self,
        index: int | str,
        owner: Owner,
        slurm_says_ended: Callable[[str], bool],
        outdated: Callable[[Seal], bool] = lambda seal: False,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> Lease:
        """Take the lease of an element (or FINISH) and give its owner an empty folder.

        A seal of an earlier submission that is `outdated` is set aside: an element's own, and with it the phase's.
        `environment` is written down with the lease.

        Raises:
            Sealed: the seal is there.
            LeaseHeld: a newer owner, or a live twin of the same attempt and restart, holds it.
        """
        element = element_name(index)
        self._refuse_if_sealed(index, owner, outdated)
        generation = 0
        for other, path in sorted(self.leases(element).items()):
            if other[:2] > (owner.attempt, owner.restart):
                raise LeaseHeld(f"element {element} belongs to attempt {other.attempt} restart {other.restart}")
            if other[:2] == (owner.attempt, owner.restart):
                self._refuse_unless_dead(element, path, slurm_says_ended)
                generation = other.generation + 1
        own = LeaseName(owner.attempt, owner.restart, generation)
        # The order matters. Our sealing folder is there before our lease: an owner that sees no newer lease after
        # making its own will be seen, and its sealing folder found, by every newer one.
        lease = Lease(
            path=self.lease_path(element, own),
            owner=own,
            folder=self.work_folder(element, own),
            element=element,
            sealing=self.new_sealing_folder(element, own),
        )
        lease.path.parent.mkdir(parents=True, exist_ok=True)
        lease.sealing.mkdir(parents=True)
        if not durable.create_file(lease.path, owner.record(environment)):
            shutil.rmtree(lease.sealing, ignore_errors=True)  # a newer owner may have: it bears the twin's name
            raise LeaseHeld(f"element {element}: a twin took lease {lease.path.name} a moment ago")
        if not self.still_mine(lease):
            raise LeaseHeld(f"element {element}: a newer attempt took it a moment ago")
        for other in self.leases(element):
            if other < own:
                self._revoke(element, other)
        # From here on no older owner can seal.
        for path in self._outdated(index, owner, outdated):
            self._set_aside(path, lease, owner)
        self._refuse_if_sealed(index, owner, outdated)
        lease.folder.mkdir(parents=True)
        return lease

    def _refuse_if_sealed(self, index: int | str, owner: Owner, outdated: Callable[[Seal], bool]) -> None:
        there = [path for path in self._seals_over(index) if path.exists()]
        if there and there != self._outdated(index, owner, outdated):
            raise Sealed(f"{self.folder.name} element {index}")

    def _seals_over(self, index: int | str) -> list[Path]:
        """Return the places of the seals that leave the owner of `index` nothing to do.

        An element's own comes first, to be set aside first: without it nobody fans in.
        """
        own = [self.element_seal_path(index)] if isinstance(index, int) and self.fans_in else []
        return [*own, self.seal_path]

    def _outdated(self, index: int | str, owner: Owner, outdated: Callable[[Seal], bool]) -> list[Path]:
        """Return those of `_seals_over` that this owner may set aside and has to."""
        paths: list[Path] = []
        for path in self._seals_over(index):
            seal = read_seal(path)
            if seal is not None and seal.submission < owner.attempt and (paths or outdated(seal)):
                paths.append(path)
        return paths

    def _set_aside(self, path: Path, lease: Lease, owner: Owner) -> None:
        """Take a seal away through the lease's sealing folder, which a newer owner, who may have sealed, removes."""
        kept = path.with_name(set_aside_name(path, "retired", owner.attempt))
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.link(path, kept)
        try:
            path.rename(lease.sealing / path.name)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            if not lease.sealing.exists():
                raise LeaseHeld(f"element {lease.element}: a newer attempt took it a moment ago") from None
            return  # the owner of another element was quicker with the phase's seal
        (lease.sealing / path.name).unlink(missing_ok=True)

    def _refuse_unless_dead(self, element: str, lease: Path, slurm_says_ended: Callable[[str], bool]) -> None:
        try:
            holder = Owner.read(lease)
        except FileNotFoundError:  # gathered, once all were sealed
            raise LeaseHeld(f"element {element} was sealed a moment ago") from None
        if holder is None:
            raise LeaseHeld(
                f"element {element} is leased to nobody knows whom: {lease} is torn; delete it if no "
                "process works on the element, or submit again (a new attempt takes over)"
            )
        if not holder.is_dead(slurm_says_ended):
            raise LeaseHeld(
                f"element {element} is worked on by process {holder.pid} on {holder.host}"
                + (f", job {holder.job}" if holder.job else "")
            )

    def _revoke(self, element: str, name: LeaseName) -> None:
        """Take from an older owner the folder its seal has to pass through.

        It is removed, not renamed: an NFS client that has it open could still link out of a renamed one.
        """
        for folder in self.sealing_folders(element, name):
            while folder.exists():
                try:
                    shutil.rmtree(folder)
                except OSError as error:
                    # The owner may be writing its seal into it right now, or taking it out.
                    if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                        raise

    def still_mine(self, lease: Lease) -> bool:
        """Return False once a newer owner took the element over."""
        return max(self.leases(lease.element), default=None) == lease.owner

    def seal(self, lease: Lease, record: dict[str, Any], told: Mapping[str, Sequence[Part]] = EMPTY) -> bool:
        """Make the lease's folder durable and link its seal; return False when a twin's seal was there first.

        `record` is what the caller knows (key, config, facts, upstream …); files are synced and hashed here unless
        their writers did: `digests.json` says so (digests.py), or the caller has it `told`.
        """
        if not self.still_mine(lease):
            return False
        told = {**digests.told_below(lease.folder), **told}
        whole_phase = lease.element == FINISH or not self.fans_in
        if not whole_phase:  # of which there are thousands, and nobody reads this of one again
            digests.forget(lease.folder)
        durable.fsync_tree(lease.folder, synced=told)
        seal = {
            "format": FORMAT,
            "root": str(lease.folder.relative_to(self.folder)),
            "files": manifest(lease.folder, told),
            "environment": environment(),
            "sealed_at": time.time(),
            **record,
        }
        path = self.seal_path if whole_phase else self.element_seal_path(int(lease.element))
        path.parent.mkdir(exist_ok=True)
        try:
            text = durable.canonical_json(durable.with_sum(seal)) + "\n"
            won = durable.create_file(path, text, by_way_of=lease.sealing)
        except OSError:
            if lease.sealing.exists():
                raise
            return False  # taken over while the files were hashed
        shutil.rmtree(lease.sealing, ignore_errors=True)
        return won

    def withdraw(self, seal: Path, seen: str, name: str) -> None:
        """Set aside the seal that a submitter saw, whose bytes have the SHA-256 `seen`, as `name`; no newer one."""
        kept = seal.with_name(name)
        try:
            seal.rename(kept)
        except FileNotFoundError:
            return
        if durable.sha256_file(kept) != seen:
            with contextlib.suppress(FileExistsError):
                os.link(kept, seal)
            kept.unlink()

    def sweep(self, lease: Lease) -> None:
        """Remove folders that older owners of this element, who cannot seal any more, left unsealed.

        Never a newer owner's, who may have begun meanwhile. What an altered seal names stays too: somebody may have
        meant the change, or want to restore it.
        """
        older = [
            folder
            for folder in self.work_folders(lease.element)
            if (name := LeaseName.of(folder)) is not None and name < lease.owner
        ]
        if not older:  # as at nearly every start, which then reads no seal and lists none
            return
        own = self.seal_path if lease.element == FINISH else self.element_seal_path(int(lease.element))
        seals = {self.seal_path, own}
        altered = {path for seal in seals for path in altered_seals(seal)}
        keep = {sealed_root(path) for path in seals | altered}
        for folder in older:
            if folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)


def sealed_root(seal_path: Path) -> str | None:
    """Return the name of the work folder that a seal names; None where nothing can be read there."""
    try:
        return Path(durable.read_json(seal_path)["root"]).name
    except (OSError, ValueError, KeyError):
        return None
