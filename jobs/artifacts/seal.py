"""What a seal says, and reading it: a damaged one is refused by name, an older one without a sum is read all the same.

{"format", "key", "material", "root", "files": {name: {size, mtime_ns, sha256}}, "parts", "upstream", "facts",
 "submission", "restart", "job", "environment", "sealed_at", …, "sum"}

A file that several ranks wrote also has "parts", the bytes of each: its sha256 is that of the list of theirs
(digests.py).
"""

import functools
import importlib.metadata
import platform
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any

from data_tools.base import digests, durable
from data_tools.base.digests import Part
from data_tools.mistake import UserMistake
from jobs.artifacts.anew import how_to_run_anew
from jobs.artifacts.hash_cache import HashCache
from jobs.artifacts.layout import SEAL, artifact_of

FORMAT = 1
MERGED = ("root", "files", "upstream", "submission", "restart")  # what the merging of elements reads of their seals
EMPTY: dict[str, list[Part]] = {}
FILE = {"size": int, "mtime_ns": int, "sha256": str}  # what a seal says of each file


def manifest(folder: Path, told: Mapping[str, Sequence[Part]] = EMPTY) -> dict[str, Any]:
    """Return {relative name: {size, mtime_ns, sha256}} of every file below `folder`.

    Those whose writers `told` their digests (digests.told_below) are not read; of several parts, "parts" has the bytes.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat, name = path.stat(), str(path.relative_to(folder))
        parts = told.get(name, ())
        files[name] = {
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": digests.whole(parts) if parts else durable.sha256_file(path),
        }
        if len(parts) > 1:
            files[name]["parts"] = [size for size, _ in parts]
    return files


def linked(folder: Path, seals: Iterable["Seal"]) -> dict[str, list[Part]]:
    """Return what seals say of those files below `folder` that are links to files of theirs: {relative name: parts}."""
    links: dict[tuple[int, int], str] = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        if S_ISREG(stat.st_mode) and stat.st_nlink > 1:
            links[stat.st_dev, stat.st_ino] = str(path.relative_to(folder))
    told: dict[str, list[Part]] = {}
    for seal in seals if links else ():
        for name, entry in seal.content["files"].items():
            stat = (seal.folder / name).lstat()
            same = (stat.st_size, stat.st_mtime_ns) == (entry["size"], entry["mtime_ns"])
            if same and "parts" not in entry and (stat.st_dev, stat.st_ino) in links:
                told[links[stat.st_dev, stat.st_ino]] = [(entry["size"], entry["sha256"])]
    return told


@functools.cache
def environment() -> dict[str, Any]:
    """Return what a seal says of the machine and the libraries that it was made with."""
    versions = {}
    for package in ("torch", "megatron-core", "transformers", "numpy", "transformer-engine", "mamba-ssm"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"host": socket.gethostname(), "python": platform.python_version(), "packages": versions}


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
    def is_whole(self) -> bool:
        """Whether it is the phase's, not an element's."""
        return self.path.name == SEAL

    @property
    def folder(self) -> Path:
        """The folder of the sealed content."""
        return artifact_of(self.path) / self.content["root"]

    @property
    def facts(self) -> dict[str, Any]:
        """What the phase returned."""
        return self.content.get("facts", {})

    @property
    def upstream(self) -> dict[str, Any]:
        """{need: digest of the seal that was read}; of an aftercorr need of a whole phase one digest an element."""
        return self.content.get("upstream", {})

    @property
    def parts(self) -> list[str] | None:
        """Digests of the elements' seals that were merged."""
        return self.content.get("parts")

    @property
    def submission(self) -> int:
        """The submission whose plan was run."""
        return self.content.get("submission", 0)

    @property
    def restart(self) -> int:
        """The restart count of the owner who sealed."""
        return self.content.get("restart", 0)

    @property
    def is_rehearsal(self) -> bool:
        """Whether nothing was made: the phase slept in its work's place."""
        return bool(self.content.get("rehearsal"))

    @property
    def has_sum(self) -> bool:
        """False of what was sealed before seals had a sum over themselves: nobody can tell whether it was altered."""
        return durable.SUM in self.content

    def without_what_is_not_merged(self) -> "Seal":
        """Return the seal with what the merging of elements reads of it: tens of thousands lie in memory at once."""
        return replace(self, content={name: self.content[name] for name in MERGED if name in self.content})

    def altered(self, rehash: bool = False, cache: HashCache | None = None) -> Iterator[str]:
        """Yield one line a sealed file that is missing or not the bytes that were sealed.

        Compares size and mtime; hashes where they differ (a copied run keeps bytes, not times) or when `rehash`.
        With a `cache` the files of a copied run are hashed once, not at every look.
        """
        sha256 = cache.sha256 if cache and not rehash else digests.sha256
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
            if stat.st_size != entry["size"] or sha256(path, entry.get("parts", ())) != entry["sha256"]:
                yield f"{path} was changed after it was sealed (sha256 is no longer {entry['sha256'][:12]}…)"

    def verify(self, rehash: bool = False, cache: HashCache | None = None) -> None:
        """Raise UserMistake where a sealed file was altered."""
        for line in self.altered(rehash, cache):
            raise UserMistake(f"{line}; restore it, or submit again: it is then sealed anew")


class DamagedSeal(UserMistake):
    """A file in a seal's place that is not the seal that was written there."""


def read_seal(path: Path) -> Seal | None:
    """Return the seal at `path`, None when there is none. Raises DamagedSeal."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        content = durable.parse_checked(data, path)
        problem = _malformed(content)
    except durable.TornFile as torn:
        problem = str(torn).removeprefix(f"{path} ")
    if problem:
        how = how_to_run_anew(artifact_of(path))
        raise DamagedSeal(f"{path} is not a seal: it {problem}; restore it, or {how}")
    said = {
        "key": content["key"],
        "parts": content.get("parts"),
        "files": {name: [entry["size"], entry["sha256"]] for name, entry in content["files"].items()},
    }
    return Seal(path, durable.sha256_bytes(durable.canonical_json(said)), content)


LATEST = 2.0**40  # seconds since 1970: what is no time is more


def _malformed(content: dict[str, Any]) -> str:
    """Return what a seal says that no seal says; "" where it may be one."""
    kinds = {
        "key": str,
        "root": str,
        "files": dict,
        "facts": dict,
        "upstream": dict,
        "material": dict,
        "parts": list,
        "submission": int,
        "restart": int,
        "job": str,
    }
    for name, kind in kinds.items():
        if name not in content and name in ("key", "root", "files"):
            return f"has no {name}"
        if not isinstance(content.get(name, kind()), kind):
            return f"has {content[name]!r:.40} for its {name}"
    for name in ("sealed_at", "started_at"):
        time = content.get(name, 0.0)
        if type(time) not in (int, float) or not 0 <= time < LATEST:
            return f"has {time!r:.40} for its {name}"
    if not durable.is_plain_path(content["root"]):
        return f"names {content['root']!r:.80} for its root, which is no place in its own folder"
    for name, entry in content["files"].items():
        if not durable.is_plain_path(name):
            return f"names the file {name!r:.80}, which is no place in its own folder"
        if not isinstance(entry, dict) or not [type(entry.get(field)) for field in FILE] == list(FILE.values()):
            return f"does not say size, mtime_ns and sha256 of its file {name!r:.80}"
        parts = entry.get("parts", [])
        if not isinstance(parts, list) or any(type(size) is not int or size < 0 for size in parts):
            return f"has {parts!r:.40} for the parts of its file {name!r:.80}"
    return ""
