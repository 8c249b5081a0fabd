"""Digests of large files, remembered: a file of the same path, size and time is not read again."""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.base import digests, durable
from data_tools.base.printing import set_in, size_text


class HashCache:
    """SHA-256 of large files by path, size and mtime, one small file each in the user's cache folder.

    Thousands of elements read and write it at the same time, so that nothing of it is shared but a folder. A cache
    that is torn or cannot be written is no error.
    """

    SMALL = 1 << 20  # bytes up to which hashing takes no longer than looking up
    LARGE = 1 << 30  # bytes from which reading takes long enough to be told of
    KEPT_S = 90 * 86_400.0

    def __init__(self, folder: Path | None = None):
        self.folder = folder or durable.cache_folder("sha256")

    def sha256(self, path: Path, parts: Sequence[int] = ()) -> str:
        """Return the SHA-256 of a file, or that of its `parts` (digests.py), read only where it is not known."""
        path = Path(path).resolve()
        stat = path.stat()
        if stat.st_size <= self.SMALL:
            return digests.sha256(path, parts)
        now: dict[str, Any] = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        now |= {"parts": list(parts)} if parts else {}
        name = durable.sha256_bytes(str(path))
        entry = self.folder / name[:2] / f"{name}.json"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            known = durable.parse_checked(entry.read_bytes(), entry)
            if known == durable.with_sum(now | {"sha256": known["sha256"]}):
                return known["sha256"]
        if stat.st_size >= self.LARGE:
            said = f"afterok: reading {path} ({size_text(stat.st_size)}) for its SHA-256, which is remembered"
            print(set_in(said), file=sys.stderr, flush=True)
        digest = digests.sha256(path, parts)
        with contextlib.suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            durable.write_checked(entry, now | {"sha256": digest})
            self._forget_old(entry.parent)
        return digest

    def _forget_old(self, folder: Path) -> None:
        for entry in folder.iterdir():
            if time.time() - entry.stat().st_mtime > self.KEPT_S:
                entry.unlink()
