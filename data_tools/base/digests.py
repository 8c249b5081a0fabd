"""Digests of large files, told by whoever wrote them: what was hashed on its way to the disk is not read again.

A file that several processes fill, each a part of it, has no SHA-256 that any of them could know. It goes by those of
its parts, which lie end to end: `whole`. `digests.json` in a folder says them of its files, and that their bytes were
synced. A seal takes them over where no file has become newer.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.base import durable

DIGESTS = "digests.json"
Part = tuple[int, str]  # bytes, SHA-256


def whole(parts: Sequence[Part]) -> str:
    """Return the digest of a file of these parts: its SHA-256 where it has one, else that of the list of theirs."""
    if len(parts) == 1:
        return parts[0][1]
    return durable.sha256_bytes("".join(f"{size} {sha256}\n" for size, sha256 in parts))


def sha256(path: Path, sizes: Sequence[int] = ()) -> str:
    """Read a file and return its digest, as `whole` makes it of parts of these lengths. Raises OSError."""
    return whole(parts_of(path, sizes)) if sizes else durable.sha256_file(path)


def parts_of(path: Path, sizes: Iterable[int]) -> list[Part]:
    """Read a file of parts of these lengths; what lies behind them is one more. Raises OSError."""
    parts = []
    with open(path, "rb") as file:
        for size in sizes:
            parts.append(_hashed(file, size))
        if (rest := _hashed(file, None))[0] or not parts:
            parts.append(rest)
    return parts


def part_of(path: Path, start: int, size: int) -> Part:
    """Read one part of a file, shorter where the file is. Raises OSError."""
    with open(path, "rb") as file:
        file.seek(start)
        return _hashed(file, size)


def _hashed(file: Any, size: int | None) -> Part:
    """Hash the next `size` bytes, or all that are left."""
    digest, done = hashlib.sha256(), 0
    while block := file.read(durable.CHUNK if size is None else min(durable.CHUNK, size - done)):
        digest.update(block)
        done += len(block)
    return done, digest.hexdigest()


class PartWriter:
    """Writes a file, or one part of it from byte `start` on beside other processes, and hashes it on the way.

    `close` syncs it. Torch writes into it as into a file.
    """

    def __init__(self, path: Path, start: int | None = None):
        """Open a part of a file; without `start` a file of its own, empty at first. Raises OSError."""
        self.path, self.start = path, start or 0
        own = os.O_TRUNC if start is None else 0
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | own, 0o666)
        self._hash, self._written = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Append bytes to the part. Raises OSError, which names the file."""
        with memoryview(data) as given, given.cast("B") as view:
            self._hash.update(view)
            at, size = 0, len(view)
            with durable.naming(self.path):
                while at < size:
                    at += os.pwrite(self._handle, view[at:], self.tell() + at)
            self._written += size
        return size

    def tell(self) -> int:
        """Return where in the file the next byte goes."""
        return self.start + self._written

    def pad(self, alignment: int) -> None:
        """Append zeros up to a multiple of `alignment`."""
        self.write(bytes(-self.tell() % alignment))

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def close(self) -> None:
        """Sync the bytes."""
        try:
            with durable.naming(self.path):
                os.fsync(self._handle)
        finally:
            os.close(self._handle)

    def part(self) -> Part:
        """Return what was written."""
        return self._written, self._hash.hexdigest()


# ---------------------------------------------------------------- a folder's


def write(folder: Path, files: Mapping[str, Sequence[Part]]) -> None:
    """Say in a folder what its writers told of files in it, whose bytes they have synced. Raises RuntimeError where a
    file has not as many bytes.
    """
    newest = 0
    for name, parts in files.items():
        stat, told = (folder / name).stat(), sum(size for size, _ in parts)
        if stat.st_size != told:
            raise RuntimeError(f"{folder / name} has {stat.st_size:,} bytes, and those who wrote it told {told:,}")
        newest = max(newest, stat.st_mtime_ns)
    durable.write_checked(folder / DIGESTS, {"files": files})
    # A file is as it was told unless it is newer than this one. Other nodes' clocks may be ahead of ours.
    os.utime(folder / DIGESTS, ns=(newest, max(newest, (folder / DIGESTS).stat().st_mtime_ns)))


def told_below(folder: Path) -> dict[str, list[Part]]:
    """Return {relative name: parts} of all files below `folder` that are as the `digests.json` beside them says.

    What is newer than that, or said by none that is whole, is left out: it has to be read.
    """
    told: dict[str, list[Part]] = {}
    for path in folder.rglob(DIGESTS):
        try:
            written, said = path.lstat().st_mtime_ns, durable.read_checked(path)["files"]
            for name, entry in said.items():
                parts = [(int(size), str(sha256)) for size, sha256 in entry]
                stat = (path.parent / name).lstat() if durable.is_plain_path(name) else path.lstat()
                if stat.st_size == sum(size for size, _ in parts) and stat.st_mtime_ns <= written:
                    told[str((path.parent / name).relative_to(folder))] = parts
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return told


def forget(folder: Path) -> None:
    """Delete every `digests.json` of ours below a folder, once a seal is to say what they do. Raises OSError."""
    for path in folder.rglob(DIGESTS):
        with contextlib.suppress(durable.TornFile):  # somebody else's, or torn: content like any other
            if durable.parse_checked(path.read_bytes(), path).keys() == {"files", durable.SUM}:
                path.unlink()
