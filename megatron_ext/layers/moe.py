"""Mixture of experts for layer specs: mcore's MoELayer with one MLP an expert (SequentialMLP), or Transformer Engine's.

Distributed checkpoints are interchangeable with Transformer Engine's grouped experts. Experts that are not trained may
be held as blocks of MXFP4 (layers/mxfp4.py), a quarter of bfloat16: each is dequantised when it is multiplied with, in
forward and again in backward, and nothing of it stays. Not yet run on a GPU.
"""

import functools
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_ext.layers.marks import marks
from megatron_ext.layers.mxfp4 import BLOCK, packed_room, unpacked
from megatron_ext.parallel.parts import MXFP4, TE, Parts


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


class _Product(torch.autograd.Function):
    """x W^T of x [tokens, in] and packed blocks of W [out, in], computed as mcore's product with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(packed)
        return _times(x, packed, backwards=False)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (packed,) = ctx.saved_tensors
        return _times(gradients[0], packed, backwards=True), None


def _times(x: torch.Tensor, packed: torch.Tensor, backwards: bool) -> torch.Tensor:
    """Return x W^T, or `backwards` x W. An expert without tokens is not dequantised."""
    if not x.numel():
        return x.new_empty(*x.shape[:-1], packed.shape[1] * BLOCK if backwards else packed.shape[0])
    weight = unpacked(packed, x.dtype)
    return layers.linear_with_frozen_weight(
        x,
        weight.mT if backwards else weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=False,
        tp_group=None,
    )


class _OfBlocks(torch.nn.Module):
    """Makes a linear layer of an expert, the class that follows it, hold blocks, which weights/blocks.py fills."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        plain = self.get_parameter("weight")
        self.weight = torch.nn.Parameter(packed_room(plain.shape, plain.device), requires_grad=False)
        for mark, value in vars(plain).items():  # mcore's
            setattr(self.weight, mark, value)

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *, bias: Any = None, **_: Any) -> torch.Tensor:
        """Return the product. What tensor ranks exchange, they exchange outside of experts."""
        output: torch.Tensor = _Product.apply(input, weight)
        return output if bias is None else output + bias

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the part of a checkpoint without blocks: checkpoints have matrices, and these are not trained."""
        state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)  # type: ignore[misc]  # of the class that follows
        return {name: value for name, value in state.items() if name.rpartition(".")[2] != "weight"}


class BlocksColumnParallelLinear(_OfBlocks, ColumnParallelLinear):
    """Applies the first matrix of an expert, held as blocks."""


class BlocksRowParallelLinear(_OfBlocks, ExpertRowParallelLinear):
    """Applies the second matrix of an expert, held as blocks."""


def moe_spec(experts: int, parts: Parts) -> Any:
    """Return `mlp` of a transformer layer with `experts` experts, and shared ones where the configuration has them."""
    grouped = parts.experts == TE
    spec = get_moe_module_spec(use_te=grouped, num_experts=experts, moe_grouped_gemm=grouped)
    layer = submodules(spec)
    if parts.experts == MXFP4:
        submodules(layer.experts).linear_fc1 = BlocksColumnParallelLinear
        submodules(layer.experts).linear_fc2 = BlocksRowParallelLinear
    elif not grouped:
        submodules(layer.experts).linear_fc2 = ExpertRowParallelLinear
    of_shared = submodules(layer.shared_experts)
    if parts.linear == TE:
        of_shared.linear_fc1, of_shared.linear_fc2 = te.TEColumnParallelLinear, te.TERowParallelLinear
    else:
        of_shared.linear_fc1, of_shared.linear_fc2 = ColumnParallelLinear, RowParallelLinear
    return spec


def submodules(spec: Any) -> Any:
    """Return the submodules that a spec names, to be changed: a ModuleSpec's, or from 0.17 on those of a partial."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules
