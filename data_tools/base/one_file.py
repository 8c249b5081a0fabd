"""The files of a folder in one, part.zip, read where they lie: a phase of 100,000 elements has a file of each, not ten.

The archive is uncompressed, so that what lies in it is mapped as the files themselves would be. `Files` reads a folder
either way.
"""

import io
import shutil
import zipfile
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_tools.base import mapped_npz

NAME = "part.zip"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files give the same bytes


def bundle(folder: Path) -> None:
    """Put the files of a folder, those of its folders too, into its part.zip, and remove them."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with zipfile.ZipFile(folder / NAME, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name, _EPOCH)
            with open(folder / name, "rb") as file, archive.open(entry, "w", force_zip64=True) as member:
                shutil.copyfileobj(file, member, 1 << 20)
    for name in names:
        (folder / name).unlink()
    for path in sorted(folder.rglob("*/"), reverse=True):
        path.rmdir()


def open_part(path: Path) -> IO[bytes]:
    """Return the file of that path, open to be read; it may lie in the part.zip of its folder or of that above."""
    folder = _part_of(path)
    return Files(folder).open(path.relative_to(folder).as_posix())


def has_part(path: Path) -> bool:
    """Return whether there is a file of that path, which may lie in a part.zip as for `open_part`."""
    folder = _part_of(path)
    return Files(folder).has(path.relative_to(folder).as_posix())


def _part_of(path: Path) -> Path:
    above = path.parent.parent
    return above if (above / NAME).exists() else path.parent


class Files:
    """Reads the files of a folder, whether they lie in its part.zip or by themselves.

    A file that is not there is a FileNotFoundError; an archive that cannot be read one of mapped_npz.UNREADABLE.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._members: dict[str, tuple[int, int]] | None = None  # name -> (first byte, end) in part.zip
        if (folder / NAME).exists():
            with open(folder / NAME, "rb") as file, zipfile.ZipFile(file) as archive:
                self._members = {entry.filename: mapped_npz.place(file, entry) for entry in archive.infolist()}

    def close(self) -> None:
        """Give up what is mapped; what is asked for later is mapped anew."""
        self.__dict__.pop("_whole", None)

    @cached_property
    def _whole(self) -> np.ndarray:
        return mapped_npz.mapped(self.folder / NAME)

    def has(self, name: str) -> bool:
        """Return whether there is a file of that name."""
        return name in self._members if self._members is not None else (self.folder / name).exists()

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        if self._members is None:
            return (self.folder / name).stat().st_size
        first, end = self._place(name)
        return end - first

    def mapped(self, name: str) -> np.ndarray:
        """Return uint8[bytes] of a file, mapped."""
        if self._members is None:
            return mapped_npz.mapped(self.folder / name)
        first, end = self._place(name)
        if end > len(self._whole):
            raise EOFError(f"{self.folder / NAME} ends within {name}")
        return self._whole[first:end]

    def open(self, name: str) -> IO[bytes]:
        """Return a file, open to be read."""
        if self._members is None:
            return open(self.folder / name, "rb")
        return io.BufferedReader(_Window(self.mapped(name)))

    def read(self, name: str) -> bytes:
        """Return all of a file."""
        with self.open(name) as file:
            return file.read()

    def _place(self, name: str) -> tuple[int, int]:
        assert self._members is not None
        if name not in self._members:
            raise FileNotFoundError(f"{self.folder / NAME} has no {name}")
        return self._members[name]


class _Window(io.RawIOBase):
    """Reads mapped bytes as a file."""

    def __init__(self, data: np.ndarray):
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        some = self._data[self._at : self._at + len(buffer)]
        buffer[: len(some)] = some.tobytes()
        self._at += len(some)
        return len(some)
