"""Keys, leases, element seals, fan-in and seals: how a phase's work becomes an artifact, exactly once.

    RUN/PHASE/KEY/
      seal.json              the phase's manifest, linked last; its presence is the only sign of success
      seals/0003.json        one an array element
      leases/0003.a2.r0.g0   who works on an element: attempt, Slurm restart count, generation
      sealing/0003.a2.r0.g0.UNIQUE/   where that owner writes its seal before linking it; whoever takes over removes it
      work/0003.a2.r0.g0/    what that owner writes; a seal names the folder that counts
      checkpoints/ metrics.jsonl tables/    survive attempts; not sealed content

A folder belongs to one owner only, so a late twin can never touch what another one sealed; seals and leases are
created by link(2), so one of many wins. Nothing here knows Slurm: who is provably dead is asked of the caller. No
decision compares clocks: attempts and restart counts order owners, and they are read from the lease's name, so that
its content may be torn.

A seal is set aside (seal.json.retired.a3: it speaks of other upstream results; .altered.a3: what it names is not what
was sealed) by the submitter whose plan said so, or by the owner of a later submission who makes a new one. A late
start of the submission that sealed, or of an older one, never does.
"""

import contextlib
import errno
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.base import durable
from jobs.artifacts.hash_cache import HashCache
from jobs.artifacts.seal import FORMAT, Seal, environment, manifest, read_seal

KEY_LENGTH = 16  # hexadecimal digits of a key: 64 bits, enough to tell the keys of one run apart
FINISH = "finish"  # stands where an element's index would, for the lease and folder of the fan-in


# -- keys ---------------------------------------------------------------------------------------------------------


def key_of(material: dict[str, Any]) -> str:
    """The key of a phase: a digest of everything that decides its result (config, array, upstream keys, inputs)."""
    return durable.sha256_bytes(durable.canonical_json(material))[:KEY_LENGTH]


def content_digest(path: Path, cache: HashCache) -> str:
    """SHA-256 of a file's bytes, or of a folder's sorted (name, digest) pairs."""
    path = Path(path)
    if path.is_file():
        return cache.sha256(path)
    names = sorted(p for p in path.rglob("*") if p.is_file())
    return durable.sha256_bytes("\n".join(f"{p.relative_to(path)} {cache.sha256(p)}" for p in names))


# -- owners and leases --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Owner:
    """Who holds a lease. (attempt, restart) orders owners; host, namespace, pid and start tell whether one is alive."""

    attempt: int
    restart: int
    job: str
    host: str
    pid: int
    started: int  # kernel start time of the pid in clock ticks since boot: a recycled pid differs
    namespace: str = ""  # where pid counts: a container on the same host may have pids of its own

    @staticmethod
    def me(attempt: int, restart: int, job: str = "") -> "Owner":
        pid = os.getpid()
        return Owner(attempt, restart, job, socket.gethostname(), pid, process_start(pid) or 0, pid_namespace())

    @staticmethod
    def read(path: Path) -> "Owner | None":
        """The owner a file names; None when the file is torn or altered. FileNotFoundError when there is none."""
        try:
            found = durable.read_checked(path)
            return Owner(**{field.name: found[field.name] for field in fields(Owner) if field.name in found})
        except (ValueError, TypeError):
            return None

    def record(self) -> str:
        """Return the text of a lease's file."""
        return durable.canonical_json(durable.with_sum(asdict(self)))

    def is_dead(self, slurm_says_ended: Callable[[str], bool]) -> bool:
        """True only when provable: the pid is gone from this host, or Slurm says the job ended."""
        here = self.host == socket.gethostname() and self.namespace in ("", pid_namespace())
        if here and process_start(self.pid) != self.started:
            return True
        return bool(self.job) and slurm_says_ended(self.job)


def pid_namespace() -> str:
    """Tells the pids of a container from those of its host; "" where the kernel does not say."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot; None when there is none (a zombie counts as none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


class LeaseHeld(Exception):
    """Another owner works on this element, or newer; this one has nothing to do."""


class Sealed(Exception):
    """The element or phase is sealed already; this owner has nothing to do."""


@dataclass(frozen=True)
class Lease:
    path: Path
    folder: Path  # this owner's own folder, empty
    element: str
    sealing: Path  # its seal is written here first; removed by the owner that takes over


class LeaseName(NamedTuple):
    """A lease as its name says it; compares like the owners it stands for."""

    attempt: int
    restart: int
    generation: int

    @staticmethod
    def of(path: Path) -> "LeaseName | None":
        """None for what is no lease (an editor's copy, .nfs0000)."""
        found = re.fullmatch(r"[^.]+\.a(\d+)\.r(\d+)\.g(\d+)", path.name)
        return LeaseName(*map(int, found.groups())) if found else None

    def __str__(self) -> str:
        return f"a{self.attempt}.r{self.restart}.g{self.generation}"


# -- the artifact -------------------------------------------------------------------------------------------------


class Artifact:
    """One PHASE/KEY folder of a run, with `elements` parts (1 for a phase that is not split)."""

    def __init__(self, folder: Path, elements: int = 1, fans_in: bool = False):
        self.folder, self.elements, self.fans_in = Path(folder), elements, fans_in

    @property
    def seal_path(self) -> Path:
        return self.folder / "seal.json"

    def element_seal_path(self, index: int) -> Path:
        return self.folder / "seals" / f"{index:04d}.json"

    def sealed_elements(self) -> list[int]:
        return [i for i in range(self.elements) if self.element_seal_path(i).exists()]

    def missing_elements(self) -> list[int]:
        """Elements that still need a task: none once sealed; element 0 stands for an unfinished fan-in."""
        if self.seal_path.exists():
            return []
        if not self.fans_in:
            return [0]
        return [i for i in range(self.elements) if not self.element_seal_path(i).exists()] or [0]

    def acquire(
        self,
        index: "int | str",
        owner: Owner,
        slurm_says_ended: Callable[[str], bool],
        outdated: "Callable[[Seal], bool]" = lambda seal: False,
    ) -> Lease:
        """Take the lease of an element (or FINISH) and give its owner an empty folder.

        A seal of an earlier submission that is `outdated` is set aside: an element's own, and with it the phase's.

        Raises:
            Sealed: the seal is there.
            LeaseHeld: a newer owner, or a live twin of the same attempt and restart, holds it.
        """
        element = index if isinstance(index, str) else f"{index:04d}"
        self._refuse_if_sealed(index, owner, outdated)
        leases = self.folder / "leases"
        leases.mkdir(parents=True, exist_ok=True)
        generation = 0
        for other, path in sorted(self._leases(element).items()):
            if other[:2] > (owner.attempt, owner.restart):
                raise LeaseHeld(f"element {element} belongs to attempt {other.attempt} restart {other.restart}")
            if other[:2] == (owner.attempt, owner.restart):
                self._refuse_unless_dead(element, path, slurm_says_ended)
                generation = other.generation + 1
        mine = LeaseName(owner.attempt, owner.restart, generation)
        # The order matters. Our sealing folder is there before our lease: an owner that sees no newer lease after
        # making its own will be seen, and its sealing folder found, by every newer one.
        sealing = self.folder / "sealing" / f"{element}.{mine}.{uuid.uuid4().hex[:8]}"
        sealing.mkdir(parents=True)
        lease = Lease(leases / f"{element}.{mine}", self.folder / "work" / f"{element}.{mine}", element, sealing)
        if not durable.create_file(lease.path, owner.record()):
            shutil.rmtree(sealing, ignore_errors=True)  # a newer owner may have removed it: it bears the twin's name
            raise LeaseHeld(f"element {element}: a twin took lease {lease.path.name} a moment ago")
        if not self.still_mine(lease):
            raise LeaseHeld(f"element {element}: a newer attempt took it a moment ago")
        for other in self._leases(element):
            if other < mine:
                self._revoke(element, other)
        # From here on no older owner can seal.
        for path in self._outdated(index, owner, outdated):
            self._set_aside(path, lease, owner)
        self._refuse_if_sealed(index, owner, outdated)
        lease.folder.mkdir(parents=True)
        return lease

    def _refuse_if_sealed(self, index: "int | str", owner: Owner, outdated: "Callable[[Seal], bool]") -> None:
        there = [path for path in self._seals_over(index) if path.exists()]
        if there and there != self._outdated(index, owner, outdated):
            raise Sealed(f"{self.folder.name} element {index}")

    def _seals_over(self, index: "int | str") -> list[Path]:
        """Return the places of the seals that leave the owner of `index` nothing to do.

        An element's own comes first, to be set aside first: without it nobody fans in.
        """
        own = [self.element_seal_path(index)] if isinstance(index, int) and self.fans_in else []
        return [*own, self.seal_path]

    def _outdated(self, index: "int | str", owner: Owner, outdated: "Callable[[Seal], bool]") -> list[Path]:
        """Return those of `_seals_over` that this owner may set aside and has to."""
        found: list[Path] = []
        for path in self._seals_over(index):
            seal = read_seal(path)
            if seal is not None and seal.submission < owner.attempt and (found or outdated(seal)):
                found.append(path)
        return found

    def _set_aside(self, path: Path, lease: Lease, owner: Owner) -> None:
        """Take a seal away by way of the lease's sealing folder: a newer owner, who may have sealed since, removes it."""
        kept = path.with_name(f"{path.name}.retired.a{owner.attempt}")
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
        holder = Owner.read(lease)
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

    def _leases(self, element: str) -> dict[LeaseName, Path]:
        found = {LeaseName.of(path): path for path in (self.folder / "leases").glob(f"{element}.a*")}
        return {name: path for name, path in found.items() if name is not None}

    def _revoke(self, element: str, name: LeaseName) -> None:
        """Take from an older owner the folder its seal has to pass through. Removing, not renaming: an NFS client that
        has it open could still link out of a renamed one."""
        for folder in (self.folder / "sealing").glob(f"{element}.{name}.*"):
            while folder.exists():
                try:
                    shutil.rmtree(folder)
                except OSError as error:
                    # The owner may be writing its seal into it right now, or taking it out.
                    if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                        raise

    def still_mine(self, lease: Lease) -> bool:
        """False once a newer owner took the element over."""
        return max(self._leases(lease.element), default=None) == LeaseName.of(lease.path)

    def seal(self, lease: Lease, record: dict[str, Any], files: dict[str, Any] | None = None) -> bool:
        """Make the lease's folder durable and link its seal; False when a twin's seal was there first.

        `record` is what the caller knows (key, config, facts, upstream …); files are hashed here unless the caller
        hands in what it read of them.
        """
        if not self.still_mine(lease):
            return False
        durable.fsync_tree(lease.folder)
        seal = {
            "format": FORMAT,
            "root": str(lease.folder.relative_to(self.folder)),
            "files": files if files is not None else manifest(lease.folder),
            "environment": environment(),
            "sealed_at": time.time(),
            **record,
        }
        whole_phase = lease.element == FINISH or not self.fans_in
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
        own = self.seal_path if lease.element == FINISH else self.element_seal_path(int(lease.element))
        seals = {self.seal_path, own}
        altered = {path for seal in seals for path in seal.parent.glob(f"{seal.name}.altered.*")}
        keep = {sealed_root(path) for path in seals | altered}
        for folder in (self.folder / "work").glob(f"{lease.element}.a*"):
            name = LeaseName.of(folder)
            if name is not None and name < LeaseName.of(lease.path) and folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)


def sealed_root(seal_path: Path) -> str | None:
    try:
        return Path(durable.read_json(seal_path)["root"]).name
    except (OSError, ValueError, KeyError):
        return None
