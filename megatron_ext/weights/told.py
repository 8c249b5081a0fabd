"""What a rank tells rank 0 of the part of a checkpoint that it wrote, in few bytes, and what all of them come to.

A rank of 15 pieces tells 400 bytes (tests/benchmarks/ranks.py), so that thousands fit into one gather.
"""

import json
import math
import sys
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data_tools.base.digests import Part
from megatron_ext.files.digest import combined
from megatron_ext.weights.dist_weights import Piece, Region, Shape

Sums = dict[str, tuple[str, Shape, int]]  # of staging.sums: key -> dtype, shape, sum


@dataclass(frozen=True)
class Told:
    """What one rank wrote."""

    file: str
    part: Part  # of that file
    pieces: list[Piece]
    sums: Sums  # of the weights
    rng: tuple[int, int] = (0, 0)  # where in the file its random states begin, and their bytes
    updates: int = 0  # of its optimizer

    def packed(self) -> bytes:
        regions = ((piece, piece.region) for piece in self.pieces)  # all in the same file
        pieces = [(r.key, r.shape, r.offset, r.size, piece.dtype, piece.start, piece.length) for piece, r in regions]
        said = (self.file, self.part, pieces, self.sums, self.rng, self.updates)
        return zlib.compress(json.dumps(said, separators=(",", ":")).encode(), 1)


@dataclass
class Everything:
    """What all ranks wrote, in the order of the ranks."""

    pieces: list[Piece] = field(default_factory=list)
    files: dict[str, list[Part]] = field(default_factory=dict)
    rng: list[tuple[str, int, int]] = field(default_factory=list)  # file, begin, bytes
    sums: Sums = field(default_factory=dict)
    updates: int = 0

    @property
    def weights_digest(self) -> str:
        return combined(self.sums)


def everything(words: Iterable[bytes]) -> Everything:
    """Return what the ranks told, each its `packed`. Raises RuntimeError where they wrote more or less than each tensor
    has: such a checkpoint is never published.
    """
    found = Everything()
    for word in words:
        file, part, pieces, sums, rng, updates = json.loads(zlib.decompress(word))
        found.pieces += [_piece(piece, file) for piece in pieces]
        found.files.setdefault(file, []).append((part[0], part[1]))
        found.rng.append((file, *rng))
        found.updates = max(found.updates, updates)
        add(found.sums, sums)
    _check_whole(found.pieces)
    return found


def _piece(said: Any, file: str) -> Piece:
    key, shape, offset, size, dtype, start, length = said
    region = Region(sys.intern(key), tuple(shape), tuple(offset), tuple(size))
    return Piece(region, sys.intern(dtype), file, start, length)


def add(total: Sums, sums: Sums) -> None:
    """Add one rank's sums to those of others."""
    for key, (dtype, shape, value) in sums.items():
        total[key] = dtype, tuple(shape), value + (total[key][2] if key in total else 0)


def _check_whole(written: Iterable[Piece]) -> None:
    """Raise RuntimeError where ranks wrote more or less than each tensor has."""
    shapes: dict[str, Shape] = {}
    elements: Counter[str] = Counter()
    for piece in written:
        shapes[piece.region.key] = piece.region.shape
        elements[piece.region.key] += math.prod(piece.region.size)
    for key, shape in shapes.items():
        if elements[key] != math.prod(shape):
            raise RuntimeError(f"{key} has {math.prod(shape):,} elements, and ranks wrote {elements[key]:,}")
