"""The one way bytes become durable: write under a temporary name, fsync, rename or link, fsync the folder.

Seals, ledger lines, checkpoint manifests and every small JSON file of a run go through here, so that after a kill
or a power cut a name is either absent or complete.
"""

import hashlib
import json
import os
import socket
import uuid
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries (renames, links, new files) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, deepest first."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = os.path.join(root, name)
            if os.path.islink(path):
                continue
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        fsync_folder(Path(root))


def _write_temporary(path: Path, data: bytes) -> Path:
    """A fsynced sibling of `path` under a name no other process of any host uses."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_file(path: Path, data: bytes | str) -> None:
    """Replace `path` atomically; readers see the old bytes or the new ones."""
    path = Path(path)
    temporary = _write_temporary(path, data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)
    fsync_folder(path.parent)


def create_file(path: Path, data: bytes | str) -> bool:
    """Create `path` with all its bytes, or return False because it exists: exactly one of many writers wins.

    Uses link(2), which is atomic on NFS too, where O_EXCL with a later write would show an empty file.
    """
    path = Path(path)
    temporary = _write_temporary(path, data.encode() if isinstance(data, str) else data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return True


def append_line(path: Path, line: str) -> None:
    """Append one line in a single write and fsync it (a reader drops a torn last line)."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (line + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value that digests are taken over: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(Path(path).read_text())


def sha256_bytes(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
