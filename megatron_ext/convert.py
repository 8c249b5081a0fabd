"""Hugging Face safetensors <-> mcore model, by the family's rules. One tensor at a time in memory besides the model."""

import json
from pathlib import Path
from typing import Any, Iterator

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from megatron_ext.models.registry import Family
from megatron_ext.models.rules import Entry, HfTensor, hf_rules, hf_shapes, placed, shard_on_rank

SHARD_BYTES = 4 << 30  # of an exported safetensors file
INDEX = "model.safetensors.index.json"


class HfTensors:
    """The tensors of a Hugging Face folder by name, wherever its files put them."""

    def __init__(self, folder: Path):
        """UserMistake when there are no safetensors or a file is unreadable."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserMistake(
                Problem(str(folder), "has no *.safetensors; convert other formats with transformers' save_pretrained")
            )
        self._handles: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserMistake(Problem(str(file), f"not a readable safetensors file ({error})")) from None
            for name in handle.keys():
                self._handles[name] = handle

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._handles.items()}

    def read(self, tensor: HfTensor) -> torch.Tensor:
        if isinstance(tensor, Entry):
            return self._handles[tensor.name].get_slice(tensor.name)[tensor.index]
        return self._handles[tensor].get_tensor(tensor)


def check_tensors(found: dict[str, tuple[int, ...]], family: Family, dims: Any, where: str) -> list[Problem]:
    """Every tensor that is missing, unknown or of another shape than config.json says."""
    expected = hf_shapes(family.mapping.rules(dims, found))
    problems = [
        Problem(where, f"tensor {name} {list(shape)} is missing")
        for name, shape in expected.items()
        if name not in found
    ]
    for name, shape in found.items():
        if name in expected:
            if shape != expected[name]:
                problems.append(
                    Problem(where, f"tensor {name} has shape {list(shape)}, config.json gives {list(expected[name])}")
                )
        elif not family.mapping.is_redundant(name, dims):
            problems.append(Problem(where, f"tensor {name} {list(shape)} is not part of a {family.name} model"))
    return problems


@torch.no_grad()
def import_weights(
    model: torch.nn.Module, folder: Path, family: Family, dims: Any, progress: Progress = silent
) -> None:
    """Fill this rank's `model` from the safetensors in `folder`. UserMistake naming all wrong tensors at once."""
    tensors = HfTensors(folder)
    shapes = tensors.shapes()
    problems = check_tensors(shapes, family, dims, str(folder))
    if problems:
        raise UserMistake(problems)
    held = placed(model, family.mapping.rules(dims, shapes))
    for done, (rule, parameter) in enumerate(held):
        joined = rule.layout.join([tensors.read(tensor) for tensor in rule.hf])
        parameter.copy_(shard_on_rank(rule, joined, model))
        progress(done + 1, len(held), "tensors")


def hf_tensors(model: torch.nn.Module, family: Family, dims: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the Hugging Face checkpoint, from a whole model (one rank)."""
    rules = family.mapping.rules(dims)
    values = {rule.name: value.detach().cpu() for rule, value in placed(model, rules)}
    shapes = hf_shapes(rules)
    for name, entries in hf_rules(rules).items():
        tensors = [rule.layout.split(values[rule.name])[position] for rule, position in entries]
        yield name, torch.stack(tensors).reshape(shapes[name])


def write_safetensors(
    folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write `tensors` as model.safetensors, or as numbered files with an index when they exceed `shard_bytes`.

    The same tensors give the same bytes. Returns the names of the files.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    total = filled = 0
    names: list[str] = []

    def flush() -> None:
        nonlocal filled
        name = f"model-{len(names) + 1:05d}.safetensors"
        save_file(shards[-1], folder / name, metadata={"format": "pt"})
        names.append(name)
        shards[-1] = dict.fromkeys(shards[-1])  # the names stay for the index, the tensors go
        shards.append({})
        filled = 0

    for name, tensor in tensors:
        tensor = tensor.to(dtype).contiguous().clone()  # a clone: safetensors refuses tensors that share memory
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > shard_bytes:
            flush()
        shards[-1][name] = tensor
        filled += size
        total += size
    flush()
    count = len(names)
    if count == 1:
        (folder / names[0]).rename(folder / "model.safetensors")
        return ["model.safetensors"]
    final = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for old, new in zip(names, final):
        (folder / old).rename(folder / new)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: final[i] for i in range(count) for key in shards[i]},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
    return [*final, INDEX]
