"""Mixture of experts for layer specs: mcore's MoELayer with one MLP an expert (SequentialMLP), or Transformer Engine's.

Distributed checkpoints are interchangeable with Transformer Engine's grouped experts.
"""

from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_ext.layers.marks import marks
from megatron_ext.parallel.parts import TE, Parts


class ExpertRowParallelLinear(RowParallelLinear):
    """Applies the second matrix of an expert, whose bias mcore mishandles in two places.

    Its MLP adds the bias in place (mlp.py:247), which autograd forbids on what `forward` returns. And under sequence
    parallelism it adds the bias's gradients over tensor ranks, though these hold different experts.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.bias is not None:
            marks(self.bias).sequence_parallel = False

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (output [tokens, h], bias [h] that the caller adds, or None) of input_ [tokens, f / t].

        f is the width of an expert, t the number of expert-tensor ranks, h the hidden size.
        """
        output, bias = super().forward(input_)
        return (output if bias is None else output.clone()), bias


def moe_spec(experts: int, parts: Parts) -> ModuleSpec:
    """Return `mlp` of a transformer layer with `experts` experts, and shared ones where the configuration has them."""
    grouped = parts.experts == TE
    spec = get_moe_module_spec(use_te=grouped, num_experts=experts, moe_grouped_gemm=grouped)
    if not grouped:
        spec.submodules.experts.submodules.linear_fc2 = ExpertRowParallelLinear
    spec.submodules.shared_experts.submodules = (
        MLPSubmodules(linear_fc1=te.TEColumnParallelLinear, linear_fc2=te.TERowParallelLinear)
        if parts.linear == TE
        else MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    return spec
