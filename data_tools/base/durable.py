"""The one way bytes become durable: write under a temporary name, fsync, rename or link, fsync the folder.

Seals, ledger lines, checkpoint manifests and every small JSON file of a run go through here, so that after a kill,
a power cut or on a full disk a name is either absent or complete. No file locks: link(2) decides races, which holds on
filesystems without flock. Every OSError raised here names the file that was meant, not the temporary one.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from data_tools.base import bounds
from data_tools.base.json_text import RepeatedKey, json_value
from data_tools.mistake import UserMistake

CHUNK = 1 << 20
TAIL = 1 << 16  # bytes looked at for the last whole line of a file
# What fsync of a folder says where the filesystem has no such thing (FUSE, CIFS); there, rename is all there is.
FOLDER_FSYNC_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
LINK_UNSUPPORTED = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # link(2) on FAT, some FUSE


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError from within name `path`."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        if error.filename2 is not None:
            del error.filename2
        raise


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries (renames, links, new files) survive a power cut, where the filesystem can."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(folder):
            os.fsync(handle)
    except OSError as error:
        if error.errno not in FOLDER_FSYNC_UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(Path(path)):  # a full disk or quota may show only here
            os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path, synced: Collection[str] = ()) -> None:
    """Sync every folder below `folder`, deepest first, and every file but those whose writers did: `synced`, by their
    names relative to `folder`.
    """
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = os.path.join(root, name)
            if not os.path.islink(path) and os.path.relpath(path, folder) not in synced:
                fsync_file(Path(path))
        fsync_folder(Path(root))


def _write_temporary(path: Path, data: bytes, folder: Path, mode: int = 0o666) -> Path:
    """Write the fsynced bytes for `path`, in `folder` under a name no other process of any host uses."""
    temporary = folder / f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):  # on a read-only filesystem even this fails; the first error counts
            temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_file(path: Path, data: bytes | str) -> None:
    """Replace `path` atomically; readers see the old bytes or the new ones."""
    path = Path(path)
    with naming(path):
        temporary = _write_temporary(path, data.encode() if isinstance(data, str) else data, path.parent)
        os.replace(temporary, path)
        fsync_folder(path.parent)


def create_file(path: Path, data: bytes | str, by_way_of: Path | None = None, mode: int = 0o666) -> bool:
    """Create `path` with all its bytes, or return False because it exists: exactly one of many writers wins.

    Uses link(2), which is atomic on NFS too, where O_EXCL with a later write would show an empty file. The bytes are
    written in the folder `by_way_of` first (default: beside `path`); whoever removes that folder forbids the creation,
    which then raises FileNotFoundError or ESTALE. `mode` is what the umask leaves of it.
    """
    path = Path(path)
    with naming(path):
        data = data.encode() if isinstance(data, str) else data
        temporary = _write_temporary(path, data, by_way_of or path.parent, mode)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # NFS repeats a request whose answer was lost, and the second one finds the first one's link.
            return os.path.samefile(temporary, path)
        except OSError as error:
            if error.errno in LINK_UNSUPPORTED:
                raise UserMistake(
                    f"{path.parent} is on a filesystem without hard links ({error.strerror}); "
                    "put the run on one that has them"
                ) from None
            raise
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)
    return True


def append_line(path: Path, line: str) -> None:
    """Append one line and fsync it: all of it or, on a full disk, nothing. One writer at a time.

    What a power cut left of an earlier line that nobody was told was written is cut off first.
    """
    with naming(path):
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            whole = _end_of_last_line(handle)
            if whole < os.fstat(handle).st_size:
                os.ftruncate(handle, whole)
            data = (line + "\n").encode()
            try:
                while data:  # a filling disk takes a part first, and refuses the next
                    data = data[os.write(handle, data) :]
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, whole)
                raise
        finally:
            os.close(handle)


def _end_of_last_line(handle: int) -> int:
    """Return how many bytes there are up to and including the last newline of an open file."""
    end = os.fstat(handle).st_size
    while end:
        start = max(0, end - TAIL)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def canonical_json(value: Any) -> str:
    """Return the one spelling of a JSON value that digests are taken over: sorted keys, no spaces."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_number
    )


def write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=_number) + "\n")


def _number(value: Any) -> Any:
    """Return Python's number for one of an array library, such as numpy.int64, which facts of a phase may hold. Raise
    TypeError for anything else that JSON does not know."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return value.item()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


class TornFile(ValueError):
    """Raised for a file that should hold JSON and does not, or not what was written: cut off, or edited."""


def read_json(path: Path) -> Any:
    """Return the value in a file. Raise TornFile, FileNotFoundError, UserMistake where it is larger than is read."""
    try:
        return json_value(bounds.read_text(path, bounds.JSON))
    except bounds.NoFile as error:
        raise TornFile(f"{path} {error.strerror}") from None
    except RepeatedKey as error:
        raise TornFile(f"{path}: {error}") from None
    except ValueError as error:
        why = str(error).removeprefix("not read: ") if str(error).startswith("not read: ") else "truncated or edited"
        raise TornFile(f"{path} is not whole JSON ({why})") from None


# -- JSON that decides something ----------------------------------------------------------------------------------

# The key of an object's sum over itself. What was written before there were sums has none, and is read all the same.
SUM = "sum"
TAG = "sum:"  # begins its value: one edit cannot make an object with a sum look like one that never had any
SUM_DIGITS = 16  # hexadecimal: 64 bits, against accidents and not against an enemy
_A_SUM = re.compile(rf"{TAG}[0-9a-f]{{{SUM_DIGITS}}}\Z")  # the whole of one: a message may begin with its tag


def sum_of(value: dict[str, Any]) -> str:
    """Return the sum over an object as JSON gives it back, whatever its spelling in a file; its own sum left out."""
    return _sum_of_plain(
        json.loads(json.dumps({key: item for key, item in value.items() if key != SUM}, default=_number))
    )


_spell = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def _sum_of_plain(value: dict[str, Any]) -> str:
    """Return the sum over an object that JSON gave, its own sum left out."""
    plain = {key: item for key, item in value.items() if key != SUM}
    return TAG + sha256_bytes(_spell(plain))[:SUM_DIGITS]


def with_sum(value: dict[str, Any]) -> dict[str, Any]:
    """Return the object with its sum, ready to be written."""
    return {**value, SUM: sum_of(value)}


def write_checked(path: Path, value: dict[str, Any]) -> None:
    """Replace `path` by an object with its sum; `read_checked` reads it."""
    write_json(path, with_sum(value))


def parse_checked(text: "str | bytes", name: object) -> dict[str, Any]:
    """Return the object in `text`, its sum checked and still in it where it has one; `name` is for the message.

    Raises:
        TornFile: not one JSON object, or not the one that was written.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise TornFile(f"{name} is not whole JSON (truncated or edited)") from None
    if not isinstance(value, dict):
        raise TornFile(f"{name} is not what afterok wrote there (no JSON object)")
    tags = text.count(TAG) if isinstance(text, str) else text.count(TAG.encode())
    its_own = tags == 1 and str(value.get(SUM)).startswith(TAG)  # as nearly always: no other text needs a look
    try:
        others = [] if its_own else _texts({key: item for key, item in value.items() if key != SUM})
        renamed = any(_A_SUM.match(each) for each in others)
        if renamed or (SUM in value and value[SUM] != _sum_of_plain(value)):
            raise TornFile(
                f"{name} was altered after it was written (its sum is {value.get(SUM)!r:.40}, that of what it "
                f"says {sum_of(value)})"
            )
    except RecursionError:
        raise TornFile(f"{name} is not what afterok wrote there (nested too deep)") from None
    return value


def _texts(value: Any) -> list[str]:
    """Return all texts in a value of JSON, keys too."""
    if isinstance(value, dict):
        return [*value, *(text for item in value.values() for text in _texts(item))]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def read_checked(path: Path) -> dict[str, Any]:
    """Return the object in a file, checked against its sum, and without it. Raise TornFile, FileNotFoundError."""
    try:
        value = parse_checked(bounds.read_bytes(path, bounds.JSON), path)
    except bounds.NoFile as error:
        raise TornFile(f"{path} {error.strerror}") from None
    value.pop(SUM, None)
    return value


def cache_folder(name: str) -> Path:
    """Return a folder of the user's cache, which may not be there yet: ~/.cache/afterok/NAME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afterok" / name


def is_plain_path(name: Any) -> bool:
    """Return whether a name out of a file stays below the folder it is joined to: relative, and without `.` and
    `..`."""
    return isinstance(name, str) and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def sha256_bytes(data: bytes | str) -> str:
    """Return the SHA-256 of bytes, or of a text in UTF-8; JSON may spell halves of pairs, which have a digest, too."""
    return hashlib.sha256(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with bounds.open_regular(path) as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
