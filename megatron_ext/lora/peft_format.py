"""Adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

The names are those of transformers' modules. A linear layer has `MODULE.lora_A.weight` [rank, in] and
`MODULE.lora_B.weight` [out, rank]. Experts are bare parameters, which PEFT adapts by `target_parameters`: A
[experts * rank, in] has expert after expert, B [out, rank * experts] the experts fastest, and of two parameters of a
module the first one's adapter is called `base_layer` (peft/tuners/lora/layer.py, ParamWrapper, peft 0.21).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data_tools.base import durable
from data_tools.mistake import Problem, UserMistake
from megatron_ext.lora.pairs import Pair
from megatron_ext.lora.peft_config import PEFT_CONFIG
from megatron_ext.lora.settings import ROUTERS, LoraConfig
from megatron_ext.models.layouts import Entry, HfTensor, Rule
from megatron_ext.weights.hf_files import HfTensors

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's model around transformers'
OUTER = "down_proj"  # the last parameter of an experts module

Factors = Mapping[str, torch.Tensor]  # whole factors by the name of their rule


def file_name(tensor: HfTensor, letter: str) -> str:
    """Return what PEFT calls factor `letter` of a matrix."""
    if isinstance(tensor, Entry):
        module, _, parameter = tensor.name.rpartition(".")
        return f"{PREFIX}{module}{'' if parameter == OUTER else '.base_layer'}.lora_{letter}.weight"
    return f"{PREFIX}{tensor.removesuffix('.weight')}.lora_{letter}.weight"


def _each(pairs: Sequence[Pair]) -> Iterator[tuple[Rule, str, list[tuple[HfTensor, int]]]]:
    """Yield (rule, "A" or "B", its adapted Hugging Face tensors, each with its place in the rule) of every factor."""
    for pair in pairs:
        yield pair.a, "A", [(tensor, i) for i, tensor in enumerate(pair.a.hf)]
        yield pair.b, "B", [(tensor, i) for i, tensor in enumerate(pair.b.hf) if pair.parts[i]]


# ---------------------------------------------------------------- out


def tensors_of(pairs: Sequence[Pair], factors: Factors) -> dict[str, torch.Tensor]:
    """Return PEFT's tensors by name."""
    tensors: dict[str, torch.Tensor] = {}
    stacks: dict[str, list[torch.Tensor]] = {}
    for rule, letter, adapted in _each(pairs):
        split = rule.layout.split(factors[rule.name])
        for tensor, place in adapted:
            name = file_name(tensor, letter)
            if isinstance(tensor, Entry):
                stacks.setdefault(name, []).append(split[place])
            else:
                tensors[name] = split[place].contiguous()
    for name, experts in stacks.items():
        along = 0 if ".lora_A." in name else 2  # [experts, rank, in], or [out, rank, experts]
        tensors[name] = torch.stack(experts, along).flatten(*((0, 1) if along == 0 else (1, 2))).contiguous()
    return tensors


def config_of(pairs: Sequence[Pair], config: LoraConfig, base: str) -> dict[str, Any]:
    """Return adapter_config.json. `base` names the Hugging Face model."""
    modules, parameters = set(), set()
    for pair in pairs:
        for tensor in pair.a.hf:
            if isinstance(tensor, Entry):
                parameters.add(".".join(tensor.name.split(".")[-3:]))  # mlp.experts.down_proj
                continue
            *_, above, name, weight = tensor.split(".")
            if name in ROUTERS or pair.as_parameter:
                parameters.add(f"{above}.{name}.{weight}")  # mlp.router.weight
            else:
                modules.add(name)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def write(folder: Path, pairs: Sequence[Pair], factors: Factors, config: LoraConfig) -> None:
    """Write PEFT's two files. For one rank."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(pairs, factors), folder / TENSORS, metadata={"format": "pt"})
    durable.write_json(folder / PEFT_CONFIG, config_of(pairs, config, base=""))


# ---------------------------------------------------------------- in


class Reader:
    """The factors in a PEFT folder."""

    def __init__(
        self, folder: Path, pairs: Sequence[Pair], config: LoraConfig, reached: frozenset[HfTensor] | None = None
    ):
        """Open the folder. `reached` are the tensors that it adapts, where it does not adapt all of `pairs`; others
        have factors of 0.

        Raise UserMistake naming all tensors that are missing, too many, or of another shape.
        """
        self.config, self._reached, self.tensors = config, reached, HfTensors(folder, TENSORS)
        stored, wanted = self.tensors.shapes(), self._shapes(pairs)
        problems = [
            Problem(str(folder), f"tensor {name} {list(shape)} is missing, or has another shape")
            for name, shape in wanted.items()
            if stored.get(name) != shape
        ]
        more = [name for name in stored if name not in wanted]
        problems += [Problem(str(folder), f"tensor {name} is none of this adapter") for name in more]
        if problems:
            raise UserMistake(problems[:8])

    def _has(self, tensor: HfTensor) -> bool:
        return self._reached is None or tensor in self._reached

    def _name(self, tensor: HfTensor, letter: str) -> str:
        """Return `file_name`; where an experts module has no adapter of its outer parameter, that of the inner."""
        name = file_name(tensor, letter)
        if isinstance(tensor, Entry):
            outer = replace(tensor, name=f"{tensor.name.rpartition('.')[0]}.{OUTER}")
            return name if self._has(outer) else name.replace(".base_layer.", ".")
        return name

    def _shapes(self, pairs: Sequence[Pair]) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor in the file, by its name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for rule, letter, adapted in _each(pairs):
            for tensor, place in adapted:
                rows, columns = rule.layout.hf_shapes()[place]
                if isinstance(tensor, Entry):
                    rows, columns = (rows * tensor.count, columns) if letter == "A" else (rows, columns * tensor.count)
                if self._has(tensor):
                    shapes[self._name(tensor, letter)] = (rows, columns)
        return shapes

    def factors(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B of a matrix, whole."""
        (a, _, from_a), (b, _, from_b) = _each([pair])
        parts_a, parts_b = ([torch.zeros(shape) for shape in rule.layout.hf_shapes()] for rule in (a, b))
        for parts, letter, adapted in ((parts_a, "A", from_a), (parts_b, "B", from_b)):
            for tensor, place in adapted:
                if self._has(tensor):
                    parts[place] = self._read(tensor, letter)
        return a.layout.join(parts_a), b.layout.join(parts_b)

    def _read(self, tensor: HfTensor, letter: str) -> torch.Tensor:
        found = self.tensors.read(self._name(tensor, letter))
        if not isinstance(tensor, Entry):
            return found
        by_expert = (tensor.count, -1) if letter == "A" else (-1, tensor.count)
        return found.unflatten(0 if letter == "A" else 1, by_expert).select(0 if letter == "A" else 2, tensor.index)

    def change(self, pair: Pair) -> torch.Tensor:
        """Return what the adapter adds to the whole matrix, fp32 [out, in]."""
        return pair.change(*self.factors(pair), self.config.scale)
