"""Pickles that others may have written. Here are those of .pt files; stored.py has those of distributed checkpoints.

A pickle may name any function of any module and have it called. Ours calls none: each class and function that a pickle
names becomes a `Node`, which keeps what it was called with. What a node means is looked up afterwards in a table of
exact pairs (module, name), by code of ours, which checks it. A name outside the table is refused, or stays a node.

Every pickle that this code base reads passes through here (tests/test_strangers_files.py). Format of .pt files, as of
torch 1.6: a zip archive of uncompressed records NAME/data.pkl, NAME/byteorder and NAME/data/KEY, one a storage.
"""

import io
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

Pair = tuple[str, str]
Shape = tuple[int, ...]

PICKLE_BYTES = 1 << 30  # of the pickle in a .pt file, which has no tensor's data
NAME_BYTES = 65_536  # of a name in a zip archive
_LOCAL_HEADER = 30  # bytes of a record's header in a zip archive, before its name and extra field

STORAGES: Mapping[Pair, torch.dtype] = {
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
    ("torch", "UntypedStorage"): torch.uint8,
    ("torch.storage", "UntypedStorage"): torch.uint8,
}
DTYPES: Mapping[Pair, torch.dtype] = {
    ("torch", name): getattr(torch, name)
    for name in (
        "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
        "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64",
    )
}  # fmt: skip
REBUILD_TENSOR: Mapping[Pair, tuple[int, ...]] = {  # function: how many arguments it may have
    ("torch._utils", "_rebuild_tensor"): (4,),
    ("torch._utils", "_rebuild_tensor_v2"): (6, 7),
    ("torch._utils", "_rebuild_tensor_v3"): (7, 8),
}
REBUILD_OTHER: Mapping[Pair, tuple[int, ...]] = {  # function: which of its arguments is the tensor
    ("torch._utils", "_rebuild_parameter"): (0,),
    ("torch._utils", "_rebuild_parameter_with_state"): (0,),
}
FROM_TYPE = ("torch._tensor", "_rebuild_from_type_v2")
ORDERED = ("collections", "OrderedDict")
NAMESPACE = ("argparse", "Namespace")
SIZE = ("torch", "Size")

TENSORS: frozenset[Pair] = frozenset({*STORAGES, *DTYPES, *REBUILD_TENSOR, *REBUILD_OTHER, FROM_TYPE, ORDERED, SIZE})
ARGUMENTS: frozenset[Pair] = TENSORS | {NAMESPACE}


class Refused(Exception):
    """A file that is not what it should be, or that names what none of its kind needs."""


class Node:
    """What a pickle calls or makes an object of: its pair, arguments, state and items. It runs nothing."""

    pair: Pair = ("", "")
    args: tuple[Any, ...]
    state: Any
    items: list[tuple[Any, Any]]

    def __new__(cls, *args: Any) -> "Node":
        node = object.__new__(cls)
        node.args, node.state, node.items = args, None, []
        return node

    def __init__(self, *_: Any) -> None:
        pass

    def __repr__(self) -> str:
        said = ", ".join(repr(each) for each in self.args if isinstance(each, (str, int, float)))
        return f"{'.'.join(self.pair)}({said})"

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append((None, value))

    add = append

    def extend(self, values: Any) -> None:
        self.items.extend((None, value) for value in values)


@dataclass(frozen=True)
class _Persistent:
    """A storage of a .pt file, by what torch calls it."""

    id: Any


class _Unpickler(pickle.Unpickler):
    """Makes nodes, lists, dicts, tuples, sets, text and numbers, and nothing else."""

    def __init__(self, file: IO[bytes], known: frozenset[Pair] | None, storages: bool):
        """Take `known`, the pairs that may be named; None lets any be named, none of which is looked up."""
        super().__init__(file)
        self._known, self._storages = known, storages
        self._kinds: dict[Pair, type] = {}  # made anew for every file: what one does to them, no other sees

    def find_class(self, module: str, name: str) -> Any:
        pair = str(module), str(name)
        if self._known is not None and pair not in self._known:
            raise Refused(f"it names {pair[0]}.{pair[1]}, which no such file needs")
        if pair not in self._kinds:
            self._kinds[pair] = type("Node", (Node,), {"pair": pair})
        return self._kinds[pair]

    def persistent_load(self, pid: Any) -> Any:
        if not self._storages:
            raise Refused("it refers to data outside of it")
        return _Persistent(pid)


def nodes(data: bytes, known: frozenset[Pair] | None, storages: bool = False) -> Any:
    """Return the nodes of a pickle. Raises Refused for any that is not whole, or names what is not `known`."""
    try:
        return _Unpickler(io.BytesIO(data), known, storages).load()
    except Refused:
        raise
    except Exception as error:  # whatever a damaged pickle makes of the machine that reads it
        raise Refused(f"its pickle is not whole ({_line(error)})") from None


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def understood(what: Callable[[], Any]) -> Any:
    """Return what `what` returns, and raise Refused in place of whatever else it raises over odd content."""
    try:
        return what()
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"its content is not understood ({type(error).__name__}: {_line(error)})") from None


def write(value: Any, file: IO[bytes]) -> None:
    """Write a pickle of objects of ours, or of torch's, as torch writes its own."""
    pickle.dump(value, file)


# ---------------------------------------------------------------- .pt files


def load(path: Path, known: frozenset[Pair] = TENSORS, unknown: bool = False) -> Any:
    """Load what torch.save wrote: dicts, lists, tuples, text, numbers, and tensors, whose memory is the file's until
    they are changed. Raises Refused where it is not whole. With `unknown`, objects of other classes stay `Node`s, which
    run nothing; otherwise they are refused by name. Raises OSError where the file cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(0, io.SEEK_END)
        if not file.tell():
            raise Refused("it is empty")
        return _load(file, 0, file.tell(), None if unknown else known)


def load_part(path: Path, start: int, length: int | None) -> Any:
    """Load what torch.save wrote into `length` bytes (None: all) of a file from `start` on, as `load` does."""
    with open(path, "rb") as file:
        return _load(file, start, file.seek(0, io.SEEK_END) - start if length is None else length, TENSORS)


def load_piece(file: IO[bytes], start: int, length: int) -> torch.Tensor:
    """Load the one tensor that torch.save wrote into `length` bytes of an open file from `start` on, as `load` does."""
    tensor = _load(file, start, length, TENSORS)
    if not isinstance(tensor, torch.Tensor):
        raise Refused(f"there is a {type(tensor).__name__} at byte {start}, not a tensor")
    return tensor


def load_object(file: IO[bytes], start: int, length: int) -> Any:
    """Load what torch.save wrote there, as `load` with `unknown` does."""
    return _load(file, start, length, None)


class _Slice(io.RawIOBase):
    """`length` bytes of an open file from `start` on, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._length - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _load(file: IO[bytes], start: int, length: int, known: frozenset[Pair] | None) -> Any:
    archive = _Archive(file, start, length)
    tree = nodes(archive.bytes("data.pkl", PICKLE_BYTES), known, storages=True)
    return understood(lambda: _Tensors(archive).made(tree))


class _Archive:
    """The records of a .pt file. They are read where they lie: nothing is decompressed."""

    def __init__(self, file: IO[bytes], start: int, length: int):
        self._file, self._start, self._length = file, start, length
        try:
            with zipfile.ZipFile(_Slice(file, start, length)) as archive:
                entries = archive.infolist()
        except Exception as error:  # zipfile.BadZipFile, and what damaged headers raise
            raise Refused(f"it is no zip archive of torch.save ({_line(error)})") from None
        roots = [entry.filename.removesuffix("data.pkl") for entry in entries if entry.filename.endswith("/data.pkl")]
        roots = [root for root in roots if root.count("/") == 1]
        if len(roots) != 1:
            raise Refused(f"it has {len(roots)} records NAME/data.pkl instead of one")
        self._entries = {entry.filename.removeprefix(roots[0]): entry for entry in entries}
        if len(self._entries) != len(entries):
            raise Refused("two of its records have one name")
        if "constants.pkl" in self._entries:
            raise Refused("it is a TorchScript program, not tensors")
        order = self.bytes("byteorder", NAME_BYTES) if "byteorder" in self._entries else b"little"
        if order != b"little":
            raise Refused(f"its bytes are in {order[:20]!r} order: save it again on a little-endian machine")
        self._mapped: Any = None  # uint8[bytes of the file]

    def place(self, name: str) -> tuple[int, int]:
        """Return (start in the file, bytes) of a record."""
        entry = self._entries.get(name)
        if entry is None:
            raise Refused(f"its record {name!r} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise Refused(f"its record {name!r} is compressed or encrypted, as torch.save writes none")
        if entry.header_offset < 0 or entry.header_offset + _LOCAL_HEADER > self._length:
            raise Refused(f"its record {name!r} lies outside of it")
        self._file.seek(self._start + entry.header_offset)
        header = self._file.read(_LOCAL_HEADER)
        if header[:4] != b"PK\3\4":
            raise Refused(f"its record {name!r} has no header")
        names, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        first = entry.header_offset + _LOCAL_HEADER + names + extra
        if first + entry.file_size > self._length:
            raise Refused(f"its record {name!r} ends after the file does")
        return self._start + first, entry.file_size

    def bytes(self, name: str, limit: int) -> bytes:
        first, size = self.place(name)
        if size > limit:
            raise Refused(f"its record {name!r} has {size:,} bytes, above {limit:,}")
        self._file.seek(first)
        return self._file.read(size)

    def memory(self, name: str, size: int) -> torch.Tensor:
        """Return the first `size` bytes of a record, uint8, mapped from the file: copied where they are changed."""
        first, length = self.place(name)
        if size > length:
            raise Refused(f"its record {name!r} has {length:,} bytes, {size:,} are needed")
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        if self._mapped is None:
            # Not by Python's mmap, which keeps the file open: a checkpoint may have thousands, all mapped at once.
            place, whole = f"/proc/self/fd/{self._file.fileno()}", self._start + self._length
            self._mapped = torch.from_file(place, shared=False, size=whole, dtype=torch.uint8).numpy()
        return torch.frombuffer(self._mapped, dtype=torch.uint8, offset=first, count=size)


class _Tensors:
    """Makes what the nodes of a .pt file mean."""

    def __init__(self, archive: _Archive):
        self._archive = archive
        self._storages: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._made: dict[int, Any] = {}  # by the identity of a node: one that is named twice is one thing

    def made(self, value: Any) -> Any:
        if isinstance(value, Node):
            if id(value) not in self._made:
                self._made[id(value)] = self._of_node(value)
            return self._made[id(value)]
        if isinstance(value, dict):
            return {key: self.made(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.made, value))
        return DTYPES.get(value.pair, value) if isinstance(value, type) and issubclass(value, Node) else value

    def _of_node(self, node: Node) -> Any:
        pair = type(node).pair
        if pair in REBUILD_TENSOR:
            return self._tensor(pair, node.args)
        if pair in REBUILD_OTHER:
            return self.made(node.args[REBUILD_OTHER[pair][0]])
        if pair == FROM_TYPE:  # (function, class, its arguments, attributes) of a tensor that has attributes
            function, _, args, *_ = node.args
            return self._of_node(function(*args))
        if pair == ORDERED:
            pairs = node.items or (node.args[0] if node.args else [])
            return {key: self.made(value) for key, value in pairs}
        if pair == NAMESPACE:
            return Namespace(**{str(name): self.made(value) for name, value in (node.state or {}).items()})
        if pair == SIZE:
            return tuple(map(int, node.args[0]))
        return node

    def _tensor(self, pair: Pair, args: tuple[Any, ...]) -> torch.Tensor:
        if len(args) not in REBUILD_TENSOR[pair] or not isinstance(args[0], _Persistent):
            raise Refused("one of its tensors has no storage of the file")
        storage, offset, size, stride = args[:4]
        own = DTYPES[args[6].pair] if pair[1] == "_rebuild_tensor_v3" else None
        memory = self._storage(storage.id, own)
        shape, steps = (tuple(map(count, part)) for part in (self.made(size), self.made(stride)))
        if len(shape) != len(steps):
            raise Refused(f"one of its tensors has shape {list(shape)} and strides {list(steps)}")
        last = count(offset) + sum((n - 1) * step for n, step in zip(shape, steps))
        if 0 not in shape and last >= memory.numel():
            raise Refused(f"a tensor {list(shape)} reaches beyond the {memory.numel():,} elements of its storage")
        if 0 in shape:
            return torch.empty(shape, dtype=memory.dtype)
        return memory.as_strided(shape, steps, count(offset))

    def _storage(self, id_: Any, own: torch.dtype | None) -> torch.Tensor:
        """Return the elements of a storage, flat; `own` is the dtype of a tensor that says it itself."""
        kind, type_, key, _, elements = id_
        if kind != "storage" or type_.pair not in STORAGES:
            raise Refused(f"one of its storages is {getattr(type_, 'pair', type_)!r}")
        stored = STORAGES[type_.pair]
        place = (str(key), own or stored)
        if place not in self._storages:
            memory = self._archive.memory(f"data/{key}", count(elements) * stored.itemsize)
            dtype = own or stored
            if memory.numel() % dtype.itemsize:
                raise Refused(f"its record data/{key} has {memory.numel():,} bytes, no whole number of {dtype}")
            if memory.numel() and memory.data_ptr() % dtype.itemsize:  # of a writer that does not align its storages
                memory = memory.clone()
            self._storages[place] = memory.view(dtype)
        return self._storages[place]


def count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise Refused(f"it has {value!r} where a count stands")
    return value
