"""Hugging Face weight files: safetensors read tensor by tensor, and written at known places.

Format: https://github.com/huggingface/safetensors#format. The safetensors library reads (memory-mapped), but writes a
file only from tensors that are all in memory; `SafetensorsFiles` lays the files out first and fills them in any order.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, Iterable, Mapping

import torch
from safetensors import SafetensorError, safe_open

from data_tools import durable
from data_tools.mistake import Problem, UserMistake
from megatron_ext.models.rules import Entry, HfTensor

Shape = tuple[int, ...]

SHARD_BYTES = 4 << 30  # of an exported file
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


class HfTensors:
    """The tensors of a Hugging Face folder by name, wherever its files put them."""

    def __init__(self, folder: Path):
        """UserMistake when there are no safetensors, when a file of the index is missing, or one is unreadable."""
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in _weight_files(folder):
            try:
                handle = safe_open(folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserMistake(
                    Problem(str(folder / file), f"not a whole safetensors file ({error}); copy or download it again")
                ) from None
            self._handles[file] = handle
            self._file_of.update(dict.fromkeys(handle.keys(), file))

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(self._slice(name).get_shape()) for name in self._file_of}

    def dtype(self, name: str) -> str:
        code = self._slice(name).get_dtype()
        return DTYPES.get(code, code)

    def file(self, name: str) -> str:
        return self._file_of[name]

    def read(self, tensor: HfTensor) -> torch.Tensor:
        """The tensor, backed by the file until it is changed."""
        if isinstance(tensor, Entry):
            return self._slice(tensor.name)[tensor.index]
        return self._handles[self._file_of[tensor]].get_tensor(tensor)

    def _slice(self, name: str) -> Any:
        return self._handles[self._file_of[name]].get_slice(name)


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files: those of the index, or model.safetensors, or all there are."""
    if (folder / INDEX).is_file():
        try:
            places: dict[str, str] = durable.read_json(folder / INDEX)["weight_map"]
        except (durable.TornFile, KeyError) as error:
            raise UserMistake(Problem(str(folder / INDEX), f"not an index of weights ({error})")) from None
        files = sorted(set(places.values()))
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise UserMistake([_missing_shard(folder / file, places) for file in missing])
        return files
    files = [SINGLE] if (folder / SINGLE).is_file() else sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise UserMistake(
            Problem(str(folder), "has no *.safetensors; convert other formats with transformers' save_pretrained")
        )
    return files


def _missing_shard(file: Path, places: Mapping[str, str]) -> Problem:
    lost = [name for name, place in places.items() if place == file.name]
    return Problem(str(file), f"is missing, with {len(lost)} tensors of the index ({lost[0]}, …); download it again")


class SafetensorsFiles:
    """model.safetensors, or numbered files with an index when the tensors exceed `shard_bytes`."""

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[str, Shape]], shard_bytes: int = SHARD_BYTES):
        """`tensors`: name -> (dtype, shape), in the order of the files. Nothing is written yet."""
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
        self._open: dict[str, int] = {}

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

    def write(self, name: str, data: torch.Tensor, first: int = 0) -> None:
        """Put `data` at element `first` of tensor `name`, in its dtype."""
        file, start = self._place[name]
        if file not in self._open:
            self._open[file] = os.open(self.folder / file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
            os.pwrite(self._open[file], self._headers[file], 0)
        data = data.to(getattr(torch, self.tensors[name][0])).contiguous()
        view = memoryview(data.reshape(-1).view(torch.uint8).numpy())
        at = start + first * data.element_size()
        while len(view):  # one call writes 2 GiB at most
            done = os.pwrite(self._open[file], view, at)
            view, at = view[done:], at + done

    def close(self) -> None:
        for handle in self._open.values():
            os.close(handle)

    def write_index(self) -> list[str]:
        """The index, where there are several files. Returns the names of all files."""
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
