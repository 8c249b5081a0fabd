"""Keys, leases, element seals, fan-in and seals: how a phase's work becomes an artifact, exactly once.

    RUN/PHASE/KEY/
      seal.json              the phase's manifest, linked last; its presence is the only sign of success
      seals/0003.json        one an array element
      leases/0003.a2.r0.g0   who works on an element: attempt, Slurm restart count, generation
      work/0003.a2.r0.g0/    what that owner writes; a seal names the folder that counts
      checkpoints/ metrics.jsonl tables/    survive attempts; not sealed content

A folder belongs to one owner only, so a late twin can never touch what another one sealed; seals and leases are
created by link(2), so one of many wins. Nothing here knows Slurm: who is provably dead is asked of the caller.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Optional

from data_tools import durable
from data_tools.mistake import UserMistake

FORMAT = 1
KEY_LENGTH = 16  # hexadecimal digits of a key: 64 bits, enough to tell the keys of one run apart
FINISH = "finish"  # stands where an element's index would, for the lease and folder of the fan-in


# -- keys ---------------------------------------------------------------------------------------------------------


def key_of(material: dict[str, Any]) -> str:
    """The key of a phase: a digest of everything that decides its result (config, array, upstream keys, inputs)."""
    return durable.sha256_bytes(durable.canonical_json(material))[:KEY_LENGTH]


def content_digest(path: Path, cache: "HashCache") -> str:
    """SHA-256 of a file's bytes, or of a folder's sorted (name, digest) pairs."""
    path = Path(path)
    if path.is_file():
        return cache.sha256(path)
    names = sorted(p for p in path.rglob("*") if p.is_file())
    return durable.sha256_bytes("\n".join(f"{p.relative_to(path)} {cache.sha256(p)}" for p in names))


class HashCache:
    """SHA-256 by path, size and mtime, kept in the user's cache folder; a cache that cannot be written is no error."""

    def __init__(self, path: Optional[Path] = None):
        cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.path = path or cache_home / "afterok" / "sha256.json"
        try:
            self.entries: dict[str, list] = durable.read_json(self.path)
        except (OSError, ValueError):
            self.entries = {}
        self.changed = False

    def sha256(self, path: Path) -> str:
        path = Path(path).resolve()
        stat = path.stat()
        known = self.entries.get(str(path))
        if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return known[2]
        digest = durable.sha256_file(path)
        self.entries[str(path)] = [stat.st_size, stat.st_mtime_ns, digest]
        self.changed = True
        return digest

    def save(self) -> None:
        if not self.changed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            durable.write_json(self.path, self.entries)
        except OSError:
            pass


# -- owners and leases --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Owner:
    """Who holds a lease. (attempt, restart) orders owners; host, pid and start time tell whether one is alive."""

    attempt: int
    restart: int
    job: str
    host: str
    pid: int
    started: int  # kernel start time of the pid in clock ticks since boot: a recycled pid differs

    @staticmethod
    def me(attempt: int, restart: int, job: str = "") -> "Owner":
        return Owner(attempt, restart, job, socket.gethostname(), os.getpid(), process_start(os.getpid()) or 0)

    def is_dead(self, slurm_says_ended: Callable[[str], bool]) -> bool:
        """True only when provable: the pid is gone from this host, or Slurm says the job ended."""
        if self.host == socket.gethostname() and process_start(self.pid) != self.started:
            return True
        return bool(self.job) and slurm_says_ended(self.job)


def process_start(pid: int) -> Optional[int]:
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

    def acquire(self, index: "int | str", owner: Owner, slurm_says_ended: Callable[[str], bool]) -> Lease:
        """Take the lease of an element (or FINISH) and give its owner an empty folder.

        Raises:
            Sealed: the seal is there.
            LeaseHeld: a newer owner, or a live twin of the same attempt and restart, holds it.
        """
        element = index if isinstance(index, str) else f"{index:04d}"
        if self.seal_path.exists() or (isinstance(index, int) and self.fans_in and self.element_seal_path(index).exists()):
            raise Sealed(f"{self.folder.name} element {element}")
        leases = self.folder / "leases"
        leases.mkdir(parents=True, exist_ok=True)
        generation = 0
        for path in sorted(leases.glob(f"{element}.a*")):
            other = Owner(**durable.read_json(path))
            if (other.attempt, other.restart) > (owner.attempt, owner.restart):
                raise LeaseHeld(f"element {element} belongs to attempt {other.attempt} restart {other.restart}")
            if (other.attempt, other.restart) == (owner.attempt, owner.restart):
                if not other.is_dead(slurm_says_ended):
                    raise LeaseHeld(f"element {element} is worked on by process {other.pid} on {other.host}"
                                    + (f", job {other.job}" if other.job else ""))
                generation += 1
        name = f"{element}.a{owner.attempt}.r{owner.restart}.g{generation}"
        if not durable.create_file(leases / name, durable.canonical_json(asdict(owner))):
            raise LeaseHeld(f"element {element}: a twin took lease {name} a moment ago")
        folder = self.folder / "work" / name
        folder.mkdir(parents=True)
        return Lease(leases / name, folder, element)

    def still_mine(self, lease: Lease) -> bool:
        """False once a newer owner took the element over."""
        def order(path: Path) -> list[int]:
            return [int(part[1:]) for part in path.name.split(".")[1:]]

        leases = (self.folder / "leases").glob(f"{lease.element}.a*")
        return max(leases, key=order) == lease.path

    def seal(self, lease: Lease, record: dict[str, Any], files: Optional[dict[str, Any]] = None) -> bool:
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
        return durable.create_file(path, durable.canonical_json(seal) + "\n")

    def retire(self, index: int, upstream: dict[str, str], attempt: int) -> None:
        """Set aside seals of this element and of the phase that speak of other upstream results than `upstream`."""
        for path in (self.seal_path, self.element_seal_path(index)):
            seal = read_seal(path)
            if seal is not None and seal.upstream != upstream:
                path.rename(path.with_name(f"{path.name}.retired.a{attempt}"))

    def sweep(self, lease: Lease) -> None:
        """Remove folders that older owners of this element left unsealed."""
        keep = {sealed_root(path) for path in [self.seal_path, *(self.folder / "seals").glob("*.json")]}
        for folder in (self.folder / "work").glob(f"{lease.element}.a*"):
            if folder != lease.folder and folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)


def sealed_root(seal_path: Path) -> Optional[str]:
    try:
        return Path(durable.read_json(seal_path)["root"]).name
    except (OSError, ValueError, KeyError):
        return None


def manifest(folder: Path) -> dict[str, Any]:
    """{relative name: {size, mtime_ns, sha256}} of every file below `folder`."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = path.stat()
        files[str(path.relative_to(folder))] = {
            "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": durable.sha256_file(path)}
    return files


def environment() -> dict[str, Any]:
    """What a seal says of the machine and the libraries it was made with."""
    versions = {}
    for package in ("torch", "megatron-core", "transformers", "numpy", "transformer-engine", "mamba-ssm"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"host": socket.gethostname(), "python": platform.python_version(), "packages": versions}


# -- reading seals ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seal:
    """A seal as read from disk. `folder` is the sealed content.

    `digest` is taken over key, files and parts, not over times, hosts or attempts: a phase that ran again and gave the
    same bytes leaves what lies downstream valid.
    """

    path: Path
    digest: str
    content: dict[str, Any]

    @property
    def folder(self) -> Path:
        artifact = self.path.parent if self.path.name == "seal.json" else self.path.parent.parent
        return artifact / self.content["root"]

    @property
    def facts(self) -> dict[str, Any]:
        return self.content.get("facts", {})

    @property
    def upstream(self) -> dict[str, str]:
        return self.content.get("upstream", {})

    def altered(self, rehash: bool = False) -> Iterable[str]:
        """One line a sealed file that is missing or not the bytes that were sealed.

        Compares size and mtime; hashes where they differ (a copied run keeps bytes, not times) or when `rehash`.
        """
        for name, entry in self.content["files"].items():
            path = self.folder / name
            try:
                stat = path.stat()
            except OSError:
                yield f"{path} is missing"
                continue
            same = stat.st_size == entry["size"] and stat.st_mtime_ns == entry["mtime_ns"]
            if same and not rehash:
                continue
            if stat.st_size != entry["size"] or durable.sha256_file(path) != entry["sha256"]:
                yield f"{path} was changed after it was sealed (sha256 is no longer {entry['sha256'][:12]}…)"

    def verify(self, rehash: bool = False) -> None:
        for line in self.altered(rehash):
            raise UserMistake(f"{line}; restore it, or delete {self.path} to have the phase run again")


def read_seal(path: Path) -> Optional[Seal]:
    """The seal at `path`, None when there is none."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        content = json.loads(data)
        content["root"], content["files"], content["key"]
    except (ValueError, KeyError, TypeError):
        raise UserMistake(f"{path} is not a seal (truncated or edited); delete it to have the phase run again") from None
    said = {"key": content["key"], "parts": content.get("parts"),
            "files": {name: [entry["size"], entry["sha256"]] for name, entry in content["files"].items()}}
    return Seal(path, durable.sha256_bytes(durable.canonical_json(said)), content)
