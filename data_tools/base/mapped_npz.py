"""Arrays in the archives that `np.savez` writes, mapped where they lie: what is not asked for is not read.

A member of such an archive is a file .npy, uncompressed, whose CRC-32 stands in the archive's directory.
"""

import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

_LOCAL_LENGTHS = 26  # bytes of a record's header in a zip archive before the lengths of its name and extra field
_BLOCK = 1 << 24  # bytes summed at a time

# What reading a damaged archive raises. Of odd flags zipfile raises RuntimeError.
UNREADABLE = (OSError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile, EOFError, struct.error)


class Column(NamedTuple):
    """Says where one array lies in an archive."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # first byte of its values
    member: int  # first byte of its member, which begins with the header of .npy
    end: int
    crc32: int  # of the member, as the archive's directory has it


def columns(file: IO[bytes]) -> dict[str, Column]:
    """Return {name: array} of an open archive; headers are checked, values are not read. Raise one of UNREADABLE."""
    found = {}
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            with archive.open(entry) as member:
                np.lib.format.read_magic(member)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                header = member.tell()
            if fortran and len(shape) > 1 or dtype.hasobject:
                raise ValueError(f"{name} is {dtype} {shape}")
            if entry.file_size != header + math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{entry.file_size} bytes of {name} for {shape}")
            first, end = place(file, entry)
            found[name] = Column(dtype, shape, first + header, first, end, entry.CRC)
    return found


def place(file: IO[bytes], entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return (first byte, end) of an uncompressed member of an open archive. Raise ValueError for a compressed one."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed")
    file.seek(entry.header_offset + _LOCAL_LENGTHS)
    names, extra = struct.unpack("<2H", file.read(4))
    first = entry.header_offset + _LOCAL_LENGTHS + 4 + names + extra
    return first, first + entry.file_size


def mapped(path: Path) -> np.ndarray:
    """Return uint8[bytes] of a file, mapped; an empty file has nothing to map."""
    return np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, dtype=np.uint8)


def array(data: np.ndarray, column: Column) -> np.ndarray:
    """Return an array of the archive whose bytes are `data`, without a copy. Raise ValueError where it ends before."""
    flat = np.frombuffer(data, column.dtype, math.prod(column.shape), column.start)
    return flat.reshape(column.shape)


def crc32(data: np.ndarray, column: Column) -> int:
    """Return the CRC-32 of an array's member, block by block: all of it is read."""
    total = 0
    for start in range(column.member, column.end, _BLOCK):
        total = zlib.crc32(data[start : min(start + _BLOCK, column.end)].data, total)
    return total
