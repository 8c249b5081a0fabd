"""An adapter in PEFT's format as llama.cpp's converter takes it.

That one knows the adapters of linear layers. Those of gpt-oss's experts, which PEFT has on two parameters that stack
all experts, are given to it as llama.cpp holds them: A [experts, rank, in] and B [experts, out, rank] for gate, up and
down each, under names that the converter maps to ffn_gate_exps, ffn_up_exps and ffn_down_exps.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from data_tools.mistake import Problem, UserMistake
from megatron_ext.lora import pairs, peft_config, peft_format
from megatron_ext.lora.settings import EXPERTS, LoraConfig
from megatron_ext.models.layouts import Entry
from megatron_ext.models.registry import read_config

MODULE = "mlp.experts"
# The converter would transpose a tensor that is called down_proj, as it does to the stacked weights themselves.
DOWN = "block_sparse_moe.experts.w2"


def check(base: Path, peft: Path) -> list[Problem]:
    """Return why llama.cpp would not have this adapter."""
    family, _, problems = read_config(base)
    adapter, more = peft_config.read(peft)
    if problems or more or family is None or adapter is None:
        return problems + more
    if family.name == "nemotron_h" and any(EXPERTS in name for name in adapter.parameters):
        said = "llama.cpp's converter has no adapters of nemotron_h's experts: merge it (merge_lora, export_hf)"
        return [Problem("adapter", said)]
    return []


def rewritten(base: Path, peft: Path, out: Path) -> LoraConfig:
    """Write the PEFT folder `peft` of the Hugging Face model `base` to `out`, for the converter. Return its settings.

    Raise UserMistake where it is not of that model.
    """
    problems = check(base, peft)
    family, dims, _ = read_config(base)
    adapter, _ = peft_config.read(peft)
    if problems or family is None or adapter is None:
        raise UserMistake(problems)
    lora, reached = pairs.reached(family, dims, adapter)
    reader = peft_format.Reader(peft, pairs.pairs(family, dims, lora), lora, reached)
    outer = {tensor.name for tensor in reached if isinstance(tensor, Entry) and tensor.name.endswith(peft_format.OUTER)}
    tensors: dict[str, torch.Tensor] = {}
    for name in reader.tensors.shapes():
        tensor = reader.tensors.read(name)
        module, found, kind = name.removeprefix(peft_format.PREFIX).partition(f".{MODULE}.")
        if not found:
            tensors[name] = tensor
            continue
        letter = "A" if "lora_A" in kind else "B"
        is_down = "base_layer" not in kind and f"{module}.{MODULE}.{peft_format.OUTER}" in outer
        by_expert = tensor.unflatten(0, (-1, lora.rank)) if letter == "A" else tensor.unflatten(1, (lora.rank, -1))
        by_expert = by_expert if letter == "A" else by_expert.permute(2, 0, 1)  # [experts, out, rank]
        for part, matrix in _matrices(by_expert, letter, is_down).items():
            tensors[f"{peft_format.PREFIX}{module}.{part}.lora_{letter}.weight"] = matrix.contiguous()
    out.mkdir(parents=True)
    save_file(tensors, out / peft_format.TENSORS, metadata={"format": "pt"})
    shutil.copyfile(peft / peft_config.PEFT_CONFIG, out / peft_config.PEFT_CONFIG)
    return lora


def _matrices(factor: torch.Tensor, letter: str, is_down: bool) -> dict[str, torch.Tensor]:
    """Return the factor of each matrix [experts, …]: gate and up share A, and their rows take turns in B."""
    if is_down:
        return {DOWN: factor}
    parts = (factor, factor.clone()) if letter == "A" else (factor[:, ::2], factor[:, 1::2])
    return {f"{MODULE}.{name}": part for name, part in zip(("gate_proj", "up_proj"), parts)}
