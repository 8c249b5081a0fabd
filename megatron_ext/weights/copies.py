"""Tensors that a checkpoint carries though the model does not need them, held against what they repeat.

A name tells what a tensor should be, its bytes whether it is: what is left out has been compared first.
"""

from collections.abc import Sequence
from typing import Any

import torch

from data_tools.mistake import Problem
from megatron_ext.models.layouts import Rule, hf_name

ELEMENTS = 1 << 24  # of two tensors that are compared at a time


def difference(copy: torch.Tensor, original: torch.Tensor) -> str:
    """Return "" where both have the same bytes, else how they differ: "differs in 3 of 64 elements, by up to 0.5"."""
    if copy.shape != original.shape or copy.dtype != original.dtype:
        ours, theirs = (f"{_dtype(tensor)} {list(tensor.shape)}" for tensor in (copy, original))
        return f"is {ours}, not {theirs}"
    count, most = 0, 0.0
    for a, b in zip(copy.reshape(-1).split(ELEMENTS), original.reshape(-1).split(ELEMENTS)):
        if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            continue
        other = (a.view(-1, 1).view(torch.uint8) != b.view(-1, 1).view(torch.uint8)).any(1)
        count += int(other.sum())
        most = max(most, float((a[other].double() - b[other].double()).abs().max()))
    return f"differs in {count:,} of {copy.numel():,} elements, by up to {most:.3g}" if count else ""


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check(tensors: Any, rules: Sequence[Rule], dims: Any, where: str) -> list[Problem]:
    """Check every tensor of a Hugging Face checkpoint that is no part of the model and no copy of one that is.

    `tensors` are convert.Tensors whose names have passed convert.check_tensors.
    """
    needed = {hf_name(tensor) for rule in rules for tensor in rule.hf}
    embedding = next((rule.hf[0] for rule in rules if rule.name == "embedding.word_embeddings.weight"), "")
    problems = []
    for name in sorted(tensors.shapes().keys() - needed):
        if name == "lm_head.weight":
            said = difference(tensors.read(name), tensors.read(embedding))
            remedy = "tie_word_embeddings says they are one: set it to false, or remove the tensor"
            if said:
                problems.append(Problem(where, f"tensor {name} {said} from {embedding}, and {remedy}"))
        elif name.endswith("inv_freq"):
            if said := _other_frequencies(tensors.read(name), dims):
                problems.append(Problem(where, f"tensor {name} {said}: correct config.json, or remove the tensor"))
        else:
            problems.append(Problem(where, f"tensor {name} is not needed, and nothing tells whether it is a copy"))
    return problems


def _other_frequencies(stored: torch.Tensor, dims: Any) -> str:
    """Return how rotary frequencies differ from those of `dims`, beyond the rounding of their dtype; "" where they do
    not.

    Files that have them are from before transformers scaled frequencies, so that they are base^(-2i / head_dim).
    """
    exponents = torch.arange(0, dims.head_dim, 2, dtype=torch.float64) / dims.head_dim
    expected = dims.rope_base**-exponents
    if stored.shape != expected.shape:
        return f"has shape {list(stored.shape)}, and config.json gives {list(expected.shape)}"
    info = torch.finfo(stored.dtype)
    # Half a unit of the dtype, and what float32 adds: a power and a quotient, each of a few units in the last place.
    allowed = expected * (info.eps + 16 * torch.finfo(torch.float32).eps) + info.smallest_normal * info.eps
    wrong = (stored.double() - expected).abs() > allowed
    if not wrong.any():
        return ""
    i = int(wrong.int().argmax())
    return f"has {float(stored[i]):.6g} at {i}, and config.json gives {float(expected[i]):.6g}"
