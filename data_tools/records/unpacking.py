"""Bytes of a file, unpacked where it is under gzip or zstd, in pieces of bounded size."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.base.bounds import open_regular
from data_tools.mistake import UserMistake

BLOCK = 1 << 16  # compressed bytes read at a time
# Compressed bytes unpacked at a time: zstd makes 128 KiB of 3 bytes at most, so a piece has 43 MiB at most.
_SLICE = 1 << 10


def unpack(path: Path, compression: str, block: int = BLOCK) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the block of the file, what a slice of it holds), unpacked where there is a compression.

    Raise UserMistake when it is cut off or damaged.
    """
    with open_regular(path) as file:
        blocks = enumerate(iter(lambda: file.read(block), b""))
        if not compression:
            yield from blocks
            return
        unpacker, ended = _unpacker(compression), True
        for number, packed in blocks:
            for start in range(0, len(packed), _SLICE):
                given, out = packed[start : start + _SLICE], []
                while given:
                    try:
                        out.append(unpacker.decompress(given))
                    except Exception as error:  # zlib.error, zstandard.ZstdError
                        raise UserMistake(f"{path} is damaged ({compression}: {error}); restore it") from None
                    ended = unpacker.eof
                    given = unpacker.unused_data if ended else b""
                    if ended:  # another member or frame may follow
                        unpacker = _unpacker(compression)
                yield number, b"".join(out)
        if not ended:
            raise UserMistake(f"{path} is cut off: its {compression} stream does not end; restore it")


def _unpacker(compression: str) -> Any:
    if compression == "gzip":
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()
