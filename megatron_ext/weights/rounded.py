"""What an export rounds: how far the tensors of a format of fewer bits are from those of the model."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from data_tools.mistake import Problem, UserMistake
from megatron_ext.models.layouts import Rule, hf_dtype


def split(rule: Rule, whole: torch.Tensor, where: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Return the Hugging Face tensors of mcore's `whole` tensor, and what a ledger's entry says of their rounding: {}
    where their format rounds nothing, else {"rounded": sums over elements}.

    Raises UserMistake for values that their format does not have.
    """
    if not hf_dtype(rule.layout):
        return rule.layout.split(whole), {}
    try:
        tensors = rule.layout.split(whole)
    except ValueError as error:
        raise UserMistake(Problem(where, f"{rule.name} {error}: it cannot be quantised")) from None
    exact = whole.float()
    difference = rule.layout.join(tensors).float() - exact
    return tensors, {
        "rounded": {
            "elements": exact.numel(),
            "changed": int(difference.count_nonzero()),
            "squares": float(difference.double().square().sum()),
            "of": float(exact.double().square().sum()),
            "largest": float(difference.abs().max()),
        }
    }


def summary(ledger: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an export's ledger says was rounded, {} for nothing: counts of matrices and of those that no bit of
    was lost, the relative error (root of squared differences over squared values) of all and by name, and the largest
    difference."""
    entries: dict[str, list[Mapping[str, Any]]] = {}
    for tensor in ledger["tensors"].values():
        if "rounded" in tensor:
            source = tensor["hf"][0][0]  # an entry of a stack: its name, its index
            entries.setdefault(_kind(source), []).append(tensor["rounded"])
    every = [entry for of_kind in entries.values() for entry in of_kind]
    if not every:
        return {}
    return {
        "matrices": len(every),
        "exact": sum(not entry["changed"] for entry in every),
        "relative_error": _relative(every),
        "by_name": {name: _relative(of_kind) for name, of_kind in sorted(entries.items())},
        "largest_error": max(entry["largest"] for entry in every),
    }


def _kind(name: str) -> str:
    """Return gate_up_proj of model.layers.0.mlp.experts.gate_up_proj_blocks."""
    return name.rpartition(".")[2].rpartition("_")[0]


def _relative(entries: Iterable[Mapping[str, Any]]) -> float:
    squares, of = (sum(entry[name] for entry in entries) for name in ("squares", "of"))
    return math.sqrt(squares / of) if of else 0.0
