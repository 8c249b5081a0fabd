"""What a distributed checkpoint keeps where: the content of its .metadata file, a pickle of torch's classes."""

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from megatron_ext.files.pickles import DTYPES, ORDERED, SIZE, Node, Pair, Refused, Shape, count, nodes, understood

METADATA_BYTES = 4 << 30  # of a .metadata file: some 10 million pieces

_CHECKPOINT = "torch.distributed.checkpoint."
_CLASSES = {  # torch's classes of a .metadata file
    name: (_CHECKPOINT + module, name)
    for module, names in {
        "metadata": (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        "filesystem": ("_StorageInfo",),
    }.items()
    for name in names
}  # fmt: skip
KNOWN: frozenset[Pair] = frozenset(
    {*_CLASSES.values(), *DTYPES, SIZE, ORDERED, ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
     ("pathlib._local", "PosixPath")}
)  # fmt: skip


@dataclass(frozen=True)
class StoredPiece:
    """A box of a tensor, and where in which file torch.save put it."""

    offset: Shape
    size: Shape
    file: str
    start: int  # bytes
    length: int  # bytes


@dataclass
class StoredTensor:
    dtype: str
    shape: Shape
    pieces: list[StoredPiece] = field(default_factory=list)


@dataclass(frozen=True)
class Stored:
    """What a distributed checkpoint keeps: tensors by key, and objects that are no tensors, without a shape."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, StoredPiece]


Box = tuple[Shape, Shape]  # the offset in its tensor, and the size


@dataclass(frozen=True)
class Table:
    """What Stored has, in a few arrays: 120,000 pieces of 900 tensors are 7 MB to tell, and a rank takes its own."""

    files: list[str]
    rows: dict[str, tuple[str, Shape, numpy.ndarray]]  # key -> dtype, shape, int64[pieces, 2 * dimensions + 3]
    objects: dict[str, StoredPiece]

    @classmethod
    def of(cls, whole: Stored) -> "Table":
        """Return the table of all that is stored."""
        files: dict[str, int] = {}
        rows = {}
        for key, tensor in whole.tensors.items():
            numbers = [
                (*piece.offset, *piece.size, files.setdefault(piece.file, len(files)), piece.start, piece.length)
                for piece in tensor.pieces
            ]
            width = 2 * len(tensor.shape) + 3
            rows[key] = tensor.dtype, tensor.shape, numpy.array(numbers, numpy.int64).reshape(-1, width)
        return cls(list(files), rows, whole.objects)

    def cut(self, wanted: Mapping[str, Sequence[Box]]) -> Stored:
        """Return what is stored of these tensors in these boxes of them; of a tensor that is not stored nothing."""
        tensors = {}
        for key, boxes in wanted.items():
            if key in self.rows:
                dtype, shape, rows = self.rows[key]
                tensors[key] = StoredTensor(dtype, shape, list(self._pieces(rows, len(shape), boxes)))
        return Stored(tensors, self.objects)

    def _pieces(self, rows: numpy.ndarray, dimensions: int, boxes: Sequence[Box]) -> Iterator[StoredPiece]:
        low, high = rows[:, :dimensions], rows[:, :dimensions] + rows[:, dimensions : 2 * dimensions]
        touched = numpy.zeros(len(rows), bool)
        for offset, size in boxes:
            begin = numpy.array(offset, numpy.int64)
            touched |= ((low < begin + numpy.array(size, numpy.int64)) & (high > begin)).all(axis=1)
        for row in rows[touched].tolist():
            file, start, length = row[2 * dimensions :]
            yield StoredPiece(
                tuple(row[:dimensions]), tuple(row[dimensions : 2 * dimensions]), self.files[file], start, length
            )


def read(path: Path, foreign: bool = False) -> Stored:
    """Read the content of a .metadata file. Raises Refused where it is none, OSError where it cannot be read.

    A `foreign` one may have more in it: megatron-core keeps what each rank planned to write. None of it is looked at.
    """
    with open(path, "rb") as file:
        data = file.read(METADATA_BYTES + 1)
    if len(data) > METADATA_BYTES:
        raise Refused(f"it has more than {METADATA_BYTES:,} bytes")
    with no_collector():
        tree = nodes(data, None if foreign else KNOWN)
        return understood(lambda: _stored(tree))


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Work without Python's collector of circles, which would look at all that is made again and again: 3.4 s instead
    of 0.9 s for 100,000 pieces.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _state(node: Any, name: str) -> Any:
    """Return what an object of torch's class `name` has."""
    if not isinstance(node, Node) or type(node).pair != _CLASSES[name]:
        raise Refused(f"it has {getattr(type(node), 'pair', type(node).__name__)!r} where {name} stands")
    return node.state


def _shape(node: Any) -> Shape:
    if isinstance(node, Node) and type(node).pair == SIZE:
        node = node.args[0]
    if not isinstance(node, (tuple, list)):
        raise Refused(f"it has {type(node).__name__} where a shape stands")
    return tuple(map(count, node))


def _stored(tree: Any) -> Stored:
    whole = _state(tree, "Metadata")
    tensors: dict[str, StoredTensor] = {}
    boxes: dict[str, dict[Shape, Shape]] = {}
    objects: dict[str, StoredPiece] = {}
    without_place = set()
    for key, entry in whole["state_dict_metadata"].items():
        if type(key) is not str:
            raise Refused(f"it has {key!r} where the key of a tensor stands")
        if isinstance(entry, Node) and type(entry).pair == _CLASSES["BytesStorageMetadata"]:
            without_place.add(key)
            continue
        tensor = _state(entry, "TensorStorageMetadata")
        dtype = DTYPES[_state(tensor["properties"], "TensorProperties")[0].pair]
        tensors[key] = StoredTensor(str(dtype).removeprefix("torch."), _shape(tensor["size"]))
        chunks = (_state(chunk, "ChunkStorageMetadata") for chunk in tensor["chunks"])
        boxes[key] = {_shape(chunk["offsets"]): _shape(chunk["sizes"]) for chunk in chunks}
    for index, where in whole["storage_data"].items():
        index, where = _state(index, "MetadataIndex"), _state(where, "_StorageInfo")
        if where.get("transform_descriptors"):
            raise Refused(f"the pieces of {index['fqn']} are stored as {where['transform_descriptors']!r}")
        if type(where["relative_path"]) is not str:
            raise Refused(f"it has {where['relative_path']!r} where the name of a file stands")
        place = where["relative_path"], count(where["offset"]), count(where["length"])
        if index["fqn"] in without_place:
            objects[index["fqn"]] = StoredPiece((), (), *place)
            continue
        tensor, offset = tensors[index["fqn"]], _shape(index["offset"])
        tensor.pieces.append(StoredPiece(offset, boxes[index["fqn"]].pop(offset), *place))
    _check(tensors, boxes)
    return Stored(tensors, objects)


def _check(tensors: Mapping[str, StoredTensor], unplaced: Mapping[str, Mapping[Shape, Shape]]) -> None:
    """Raise Refused for pieces that lie in no file, or outside of their tensor."""
    for key, tensor in tensors.items():
        if unplaced[key]:
            raise Refused(f"the piece of {key} at {list(next(iter(unplaced[key])))} lies in no file")
        for piece in tensor.pieces:
            dimensions = len(piece.offset) == len(piece.size) == len(tensor.shape)
            if not dimensions or any(a + n > all_ for a, n, all_ in zip(piece.offset, piece.size, tensor.shape)):
                raise Refused(f"a piece of {key} {list(tensor.shape)} is {list(piece.size)} at {list(piece.offset)}")
