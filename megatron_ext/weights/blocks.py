"""Experts that are held as blocks of MXFP4, filled from a distributed checkpoint that has them as matrices.

They are refused where a matrix has values that its blocks would round: what is computed is what the checkpoint holds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_tools.mistake import Problem, UserMistake
from megatron_ext.device import device
from megatron_ext.layers.mxfp4 import packed, unpacked
from megatron_ext.models.layouts import Rule, placed, shard_on_rank
from megatron_ext.models.registry import stages
from megatron_ext.weights.dist_weights import Reader, regions


@torch.no_grad()
def load(parts: list[Any], rules: Sequence[Rule], weights: Path) -> None:
    """Fill the packed parameters of this rank's `parts` from the checkpoint `weights`, a matrix at a time.

    UserMistake where a matrix is no MXFP4.
    """
    reader = Reader(weights)
    for part in stages(parts):
        for rule, parameter in placed(part, rules):
            if parameter.dtype != torch.uint8:
                continue
            whole = torch.cat([reader.read(region).reshape(-1, *rule.layout.shape[1:]) for region, _ in regions(rule)])
            matrix = shard_on_rank(rule, whole, part).to(device())
            parameter.copy_(_blocks(matrix, rule.name, weights))


def _blocks(matrix: torch.Tensor, name: str, weights: Path) -> torch.Tensor:
    """Return a matrix as packed blocks. UserMistake where they would round it."""
    try:
        blocks = packed(matrix)
        wrong = int((unpacked(blocks, matrix.dtype) != matrix).sum())
    except ValueError:  # values that are not finite
        blocks, wrong = matrix, int((~torch.isfinite(matrix)).sum())
    if wrong:
        said = f"{name} of {weights} has {wrong:,} of {matrix.numel():,} values that are none of MXFP4's"
        remedy = "leave base out, or export the model with quantization: mxfp4, which rounds, and import that"
        raise UserMistake(Problem("base", f"{said}: {remedy}"))
    return blocks
