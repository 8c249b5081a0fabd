"""mcore's distributed checkpoint format (torch_dist), written and read tensor by tensor by plain processes.

No model, no process group, no megatron-core: what is in memory is one piece at a time. The tensors are whole, so that
any parallel layout loads them. The files are those of torch.distributed.checkpoint:

    *.distcp         torch.save'd pieces one after another; each writer has its own file, or its own part of one
    .metadata        pickled Metadata: tensor -> shape, dtype, pieces; piece -> file, offset, length
    metadata.json    mcore's mark of the format         common.pt    mcore's state that is not a tensor: here none

torch's own FileSystemWriter keeps every tensor of a file until it closes it (filesystem.py, `tensor_dict`). What is
written here is hashed on its way, and synced by its writer: digests.py says how that is told.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils.serialization import config as serialization

from data_tools.base import digests, durable
from data_tools.base.digests import Part, PartWriter
from data_tools.base.inside import inside
from data_tools.base.open_cache import OpenCache
from data_tools.mistake import Problem, UserMistake
from megatron_ext.files import pickles, stored
from megatron_ext.files.stored import Stored, StoredPiece
from megatron_ext.models.layouts import Rule

Shape = tuple[int, ...]

METADATA, COMMON, MARK = ".metadata", "common.pt", "metadata.json"
PIECE_BYTES = 64 << 20
ALIGNMENT = 64  # bytes, of a piece in its file, as torch.save aligns the data within: so it can be mapped
FORMAT = {  # megatron.core.dist_checkpointing.core.CheckpointingConfig
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True, slots=True)
class Region:
    """A box of a checkpoint tensor: `size` elements from `offset`, of `shape` in all."""

    key: str
    shape: Shape
    offset: Shape
    size: Shape


@dataclass(frozen=True, slots=True)  # a hundred thousand lie in rank 0's memory at once
class Piece:
    """A region and where its bytes are."""

    region: Region
    dtype: str
    file: str
    start: int  # bytes
    length: int  # bytes


def regions(rule: Rule) -> Iterator[tuple[Region, slice]]:
    """Yield what a distributed checkpoint keeps of a rule's tensor: regions, each with its rows of mcore's whole
    tensor.

    mcore stacks experts along a first axis under one key (transformer/moe/experts.py, `sharded_state_dict`).
    """
    key = rule.te_name or rule.name
    stack: tuple[tuple[int, int, int], ...] = ()
    if rule.experts:
        before, after = key.split(".mlp.experts.")
        expert, rest = after.split(".", 1)
        key, stack = f"{before}.mlp.experts.experts.{rest}", ((rule.experts, int(expert), 1),)
    tail = tuple((size, 0, size) for size in rule.layout.shape[1:])
    start = 0
    for suffix, rows in rule.layout.stored():
        shape, offset, size = zip(*stack, (rows, 0, rows), *tail)
        yield Region(key + suffix, shape, offset, size), slice(start, start + rows)
        start += rows


def pieces(region: Region, item_bytes: int) -> Iterator[tuple[Region, int]]:
    """Yield the region in boxes of at most PIECE_BYTES (or a row), each with how many of its elements come before."""
    axis = next((i for i, size in enumerate(region.size) if size > 1), 0)
    row = math.prod(region.size[axis + 1 :])
    step = max(1, PIECE_BYTES // (row * item_bytes))
    for first in range(0, region.size[axis], step):
        offset, size = list(region.offset), list(region.size)
        offset[axis] += first
        size[axis] = min(step, region.size[axis] - first)
        yield replace(region, offset=tuple(offset), size=tuple(size)), first * row


class Writer:
    """One process's file of a checkpoint, or its part of one: `write` appends, `written` tells what is where."""

    def __init__(self, folder: Path, index: int = 0, start: int | None = None):
        """Open file `index`, as its only writer, or from byte `start` on (a multiple of ALIGNMENT) beside others."""
        folder.mkdir(parents=True, exist_ok=True)
        self.name = f"__{index}_0.distcp"
        self.written: list[Piece] = []
        self._file = PartWriter(folder / self.name, start)

    def write(self, region: Region, data: torch.Tensor) -> None:
        data = data.contiguous()
        # torch.save writes all of the storage below a view; this is one of the data's size, on the same memory.
        bytes_ = torch.from_numpy(data.reshape(-1).view(torch.uint8).numpy())
        start = self._align()
        _save(bytes_.view(data.dtype).reshape(region.size), self._file)
        dtype = str(data.dtype).removeprefix("torch.")
        self.written.append(Piece(region, dtype, file=self.name, start=start, length=self._file.tell() - start))

    def append(self, data: bytes) -> tuple[int, int]:
        """Write what is no piece of a tensor; return where it begins, and its bytes."""
        start = self._align()
        self._file.write(data)
        return start, len(data)

    def _align(self) -> int:
        self._file.pad(ALIGNMENT)
        return self._file.tell()

    def close(self) -> Part:
        """Sync what was written, filled up to ALIGNMENT. Return its bytes and its SHA-256."""
        self._align()
        self._file.close()
        return self._file.part()


def _save(data: torch.Tensor, file: Any) -> None:
    # Without checksums, which take half the time: seals and sums tell more. torch makes `patch` at run time.
    with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        torch.save(data, file)


def aligned(size: int) -> int:
    """Return the bytes that something of `size` takes in a Writer's file."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@functools.cache
def stored_bytes(size: Shape, dtype: torch.dtype) -> int:
    """Return the bytes that a Writer needs for one piece: how far the next one's begin is from its own."""
    counter = _Counter()
    _save(torch.empty(size, dtype=dtype), counter)  # the memory is not touched
    return aligned(counter.size)


class _Counter:
    """Counts what is written."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        pass


def finish(folder: Path, written: Iterable[Piece]) -> dict[str, list[Part]]:
    """Make the folder, which holds all files, a checkpoint of these pieces. Return the digests of what it wrote."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with stored.no_collector():
        for piece in written:
            region = piece.region
            tensor = tensors.setdefault(
                region.key,
                TensorStorageMetadata(TensorProperties(getattr(torch, piece.dtype)), torch.Size(region.shape), []),
            )
            offset = torch.Size(region.offset)
            tensor.chunks.append(ChunkStorageMetadata(offset, torch.Size(region.size)))
            index = MetadataIndex(region.key, offset, len(tensor.chunks) - 1)
            places[index] = _StorageInfo(piece.file, piece.start, piece.length)
        # Without torch's note of where and when it was saved: the same pieces give the same bytes.
        metadata = Metadata({**tensors}, storage_data=places, version=CURRENT_DCP_VERSION)
        told = {METADATA: [_write_whole(folder / METADATA, lambda file: pickles.write(metadata, file))]}
    told[COMMON] = [_write_whole(folder / COMMON, lambda file: torch.save({}, file))]
    durable.write_json(folder / MARK, FORMAT)
    return told | {MARK: digests.parts_of(folder / MARK, ())}


def _write_whole(path: Path, write: Callable[[Any], None]) -> Part:
    """Write a file under another name first. Return what it is."""
    file = PartWriter(path.with_name(f"{path.name}.tmp"))
    write(file)
    file.close()
    file.path.replace(path)
    return file.part()


class Reader:
    """The tensors of a distributed checkpoint, whatever layout wrote it, and whoever: pickles.py reads its pickles."""

    def __init__(self, folder: Path, foreign: bool = False, known: Stored | None = None):
        """Open a checkpoint; raises UserMistake when it is none.

        A `foreign` one, another program's, may have state beside its tensors: `common`, in which classes are `Node`s.
        With `known`, which another rank read there, or a part of it, nothing is read yet.
        """
        self.folder = folder
        self.common: Any = {}
        self._files = OpenCache[str, IO[bytes]](lambda file: open(inside(folder, file), "rb"))
        if known is None:
            self._open(foreign)
        else:
            self.stored = known

    def _open(self, foreign: bool) -> None:
        folder = self.folder
        known = pickles.ARGUMENTS if foreign else pickles.TENSORS
        try:
            self.stored = stored.read(inside(folder, METADATA), foreign)
            beside = inside(folder, COMMON, needed=False)
            self.common = pickles.load(beside, known, unknown=foreign) if beside else {}
        except (OSError, pickles.Refused, UserMistake) as error:
            said = f"not a distributed checkpoint that is understood: {error}"
            raise UserMistake(Problem(str(folder), said)) from None
        if self.common != {} and not foreign:
            what = ", ".join(map(str, self.common)) if isinstance(self.common, dict) else type(self.common).__name__
            said = f"{COMMON} has {what}"
            raise UserMistake(Problem(str(folder), f"{said}, and none of our checkpoints has anything there"))

    def tensors(self) -> dict[str, tuple[str, Shape]]:
        """Return {key: (dtype, shape)}. Vocabulary padding counts as rows."""
        return {key: (tensor.dtype, tensor.shape) for key, tensor in self.stored.tensors.items()}

    def read(self, region: Region) -> torch.Tensor:
        """Return the region's elements. One stored piece that covers it is mapped from its file, not copied."""
        whole: torch.Tensor | None = None
        found = 0  # elements
        for piece in self.stored.tensors[region.key].pieces:
            low = [max(a, b) for a, b in zip(region.offset, piece.offset)]
            high = [min(a + n, b + m) for a, n, b, m in zip(region.offset, region.size, piece.offset, piece.size)]
            if any(a >= b for a, b in zip(low, high)):
                continue
            data = self.load(region.key, piece)
            part = data[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, piece.offset))]
            if part.shape == region.size:
                return part
            if whole is None:
                whole = _room(region.size, part.dtype)
            whole[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, region.offset))] = part
            found += part.numel()
        if whole is None or found < whole.numel():
            what = "nothing" if whole is None else f"{found:,} of {whole.numel():,} elements"
            raise UserMistake(Problem(str(self.folder), f"has {what} of {region.key} at {list(region.offset)}"))
        return whole

    def object(self, key: str) -> Any:
        """Return an object that is stored beside the tensors, in which classes are `Node`s."""
        piece = self.stored.objects[key]
        try:
            return pickles.load_object(self._files[piece.file], piece.start, piece.length)
        except (OSError, pickles.Refused) as error:
            said = f"the object {key} at byte {piece.start:,} is damaged: {error}"
            raise UserMistake(Problem(str(self.folder / piece.file), said)) from None

    def load(self, key: str, piece: StoredPiece) -> torch.Tensor:
        """Return the elements of one stored piece of a tensor, mapped from its file."""
        path = self.folder / piece.file
        try:
            data = pickles.load_piece(self._files[piece.file], piece.start, piece.length)
        except (OSError, pickles.Refused) as error:
            said = f"the piece of {key} at byte {piece.start:,} is damaged: {error}"
            raise UserMistake(Problem(str(path), said)) from None
        dtype = getattr(torch, self.stored.tensors[key].dtype)
        if tuple(data.shape) != piece.size or data.dtype != dtype:
            said = f"{data.dtype} {list(data.shape)} instead of {dtype} {list(piece.size)}"
            raise UserMistake(Problem(str(path), f"the piece of {key} at byte {piece.start:,} is {said}"))
        return data


def _room(size: Shape, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor in huge pages where the system has them: numpy asks for them, torch does not. The
    first touch of small pages takes longer than the copy into them.
    """
    return torch.from_numpy(numpy.empty(math.prod(size) * dtype.itemsize, numpy.uint8)).view(dtype).reshape(size)
