"""Hugging Face weight files: safetensors read tensor by tensor, and written at known places.

Format: https://github.com/huggingface/safetensors#format. The safetensors library reads (memory-mapped), but writes a
file only from tensors that are all in memory; `SafetensorsFiles` lays the files out first and fills them in any order.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from data_tools.base import durable
from data_tools.base.inside import inside
from data_tools.base.open_cache import OpenCache
from data_tools.mistake import Problem, UserMistake
from megatron_ext.models.layouts import Entry, HfTensor
from megatron_ext.weights.copies import difference

Shape = tuple[int, ...]

SHARD_BYTES = 4 << 30  # of an exported file
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
OTHERS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")  # weights that are not read
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
CODES = {dtype: code for code, dtype in DTYPES.items()}


class HfTensors:
    """The tensors of a Hugging Face folder by name, wherever its files put them."""

    def __init__(self, folder: Path, single: str = SINGLE):
        """Open a folder; raises UserMistake when there are no safetensors, when a file of the index is missing, or one
        is unreadable.

        `single`: the file's name where there is one for all. transformers and PEFT make the same choice.
        """
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        files = _weight_files(folder, single)
        for file in files:
            path = inside(folder, file)
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserMistake(
                    Problem(str(folder / file), f"not a whole safetensors file ({error}); copy or download it again")
                ) from None
            self._handles[file] = handle
            for name in handle.keys():
                self._add(name, file)
        if files != [single] and (index := inside(folder, INDEX, needed=False)):
            self._check_index(index)

    def _check_index(self, index: Path) -> None:
        """Raise UserMistake where the index has a tensor in a file that lacks it: the files are of other models."""
        places = _places(index)
        held = {file: set(self._handles[file].keys()) for file in set(places.values())}
        lost = [(name, file) for name, file in places.items() if name not in held[file]]
        if lost:
            name, file = lost[0]
            said = f"{len(lost)} of {len(places)} tensors are not in the files that it names: {name!r:.200} in {file}"
            raise UserMistake(Problem(str(index), f"{said}: copy or download the folder again"))

    def _add(self, name: str, file: str) -> None:
        """Count a tensor. UserMistake where another file has it too, and otherwise."""
        first = self._file_of.setdefault(name, file)
        if first == file:
            return
        if said := difference(self._handles[file].get_tensor(name), self._handles[first].get_tensor(name)):
            where = f"tensor {name} is in {first} and in {file}, where it {said}"
            raise UserMistake(Problem(str(self.folder), f"{where}: remove the file that is not of this model"))

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(self._slice(name).get_shape()) for name in self._file_of}

    def dtype(self, name: str) -> str:
        code = self._slice(name).get_dtype()
        return DTYPES.get(code, code)

    def file(self, name: str) -> str:
        return self._file_of[name]

    def read(self, tensor: HfTensor) -> torch.Tensor:
        """Return the tensor, backed by the file until it is changed."""
        if isinstance(tensor, Entry):
            return self._slice(tensor.name)[tensor.index]
        return self._handles[self._file_of[tensor]].get_tensor(tensor)

    def _slice(self, name: str) -> Any:
        return self._handles[self._file_of[name]].get_slice(name)


def _weight_files(folder: Path, single: str) -> list[str]:
    """Return the names of the safetensors files: the single one, or those of the index, whatever others lie there.

    (transformers/modeling_utils.py, `_get_resolved_checkpoint_files`; peft/utils/save_and_load.py,
    `load_peft_weights`, which knows no index.)
    """
    if inside(folder, single, needed=False):
        return [single]
    if single != SINGLE:
        raise UserMistake(Problem(str(folder), f"has no {single}{_instead(folder)}"))
    index = inside(folder, INDEX, needed=False)
    if index is None:
        numbered = _numbered(folder)
        if not numbered:
            raise UserMistake(Problem(str(folder), f"has neither {single} nor {INDEX}{_instead(folder)}"))
        return numbered
    places = _places(index)
    files = sorted(set(places.values()))
    missing = [file for file in files if inside(folder, file, needed=False) is None]
    if missing:
        raise UserMistake([_missing_shard(folder / file, file, places) for file in missing])
    return files


def _places(index: Path) -> dict[str, str]:
    """Return {tensor: file}, as an index has it."""
    try:
        places = durable.read_json(index)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserMistake(Problem(str(index), f"not an index of weights ({error!r})")) from None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise UserMistake(Problem(str(index), "not an index of weights: weight_map gives no file for each tensor"))
    return places


def _numbered(folder: Path) -> list[str]:
    """Return model-00001-of-00003.safetensors and so on, where all are there: their index was not copied along."""
    numbers = {path.name: _SHARD.fullmatch(path.name) for path in folder.iterdir()}
    shards = {name: (int(shard[1]), int(shard[2])) for name, shard in numbers.items() if shard}
    counts = {count for _, count in shards.values()}
    if len(counts) > 1:
        raise UserMistake(Problem(str(folder), f"has the shards of {len(counts)} checkpoints, and no {INDEX}"))
    lost = sorted(set(range(1, max(counts, default=0) + 1)) - {number for number, _ in shards.values()})
    if lost:
        said = f"has {len(shards)} of {max(counts)} shards: number {lost[0]} is missing; copy or download it"
        raise UserMistake(Problem(str(folder), said))
    return sorted(shards)


def _instead(folder: Path) -> str:
    """Return what a folder has in place of the weights that are looked for, for a message."""
    others = sorted(path.name for pattern in OTHERS for path in folder.glob(pattern))
    has = f", but {', '.join(others[:3])}{', …' if len(others) > 3 else ''}" if others else ""
    return f"{has}; write it with save_pretrained of transformers or PEFT"


def _missing_shard(path: Path, file: str, places: Mapping[str, str]) -> Problem:
    lost = [name for name, place in places.items() if place == file]
    return Problem(str(path), f"is missing, with {len(lost)} tensors of the index ({lost[0]}, …); download it again")


class SafetensorsFiles:
    """model.safetensors, or numbered files with an index when the tensors exceed `shard_bytes`."""

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[str, Shape]], shard_bytes: int = SHARD_BYTES):
        """Lay out the files of `tensors`: name -> (dtype, shape), in the order of the files. Nothing is written yet."""
        self.folder, self.tensors = folder, tensors
        self._bytes = {
            name: getattr(torch, dtype).itemsize * math.prod(shape) for name, (dtype, shape) in tensors.items()
        }
        shards: list[list[str]] = [[]]
        filled = 0
        for name, size in self._bytes.items():
            if shards[-1] and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
        self.files = dict(zip(names, shards))
        self._place: dict[str, tuple[str, int]] = {}
        self._headers = {file: self._header(file, shard) for file, shard in self.files.items()}
        self._begun: set[str] = set()
        self._open = OpenCache[str, IO[bytes]](self._opened)

    def _header(self, file: str, names: list[str]) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name in sorted(names, key=lambda name: -getattr(torch, self.tensors[name][0]).itemsize):  # aligned
            dtype, shape = self.tensors[name]
            end = start + self._bytes[name]
            header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
            self._place[name] = (file, start)
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        for name in names:
            self._place[name] = (file, self._place[name][1] + 8 + len(text))
        return len(text).to_bytes(8, "little") + text

    def file(self, name: str) -> str:
        return self._place[name][0]

    def _opened(self, file: str) -> IO[bytes]:
        """Open a file; the first time it is begun with its header."""
        handle = open(self.folder / file, "r+b" if file in self._begun else "wb", buffering=0)
        if file not in self._begun:
            handle.write(self._headers[file])
            self._begun.add(file)
        return handle

    def write(self, name: str, data: torch.Tensor, first: int = 0) -> None:
        """Put `data` at element `first` of tensor `name`, in its dtype."""
        file, start = self._place[name]
        handle = self._open[file].fileno()
        data = data.to(getattr(torch, self.tensors[name][0])).contiguous()
        view = data.reshape(-1).view(torch.uint8).numpy().data
        at = start + first * data.element_size()
        while len(view):  # one call writes 2 GiB at most
            done = os.pwrite(handle, view, at)
            view, at = view[done:], at + done

    def close(self) -> None:
        self._open.close()

    def write_index(self) -> list[str]:
        """Write the index, where there are several files. Return the names of all files."""
        if len(self.files) == 1:
            return list(self.files)
        index = {
            "metadata": {"total_size": sum(self._bytes.values())},
            "weight_map": {name: self.file(name) for name in self.tensors},
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
        return [*self.files, INDEX]


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, tuple[str, Shape]],
    values: Iterable[tuple[str, torch.Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write all `values`, whose dtypes and shapes are `tensors`. Returns the names of the files."""
    files = SafetensorsFiles(folder, tensors, shard_bytes)
    for name, value in values:
        files.write(name, value)
    files.close()
    return files.write_index()
