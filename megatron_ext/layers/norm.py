"""RMSNorm and LayerNorm in torch, for layer specs without Transformer Engine.

mcore's own torch norms refuse sequence parallelism and zero-centred scales (transformer/torch_norm.py:25-36).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from megatron_ext import cpu_linear
from megatron_ext.layers.marks import marks


class Norm(torch.nn.Module):
    """Normalises the last dimension as `config.normalization` says: "RMSNorm" or "LayerNorm".

    Under sequence parallelism each tensor rank sees its own tokens only; the parameters are marked, and mcore adds
    their gradients over the tensor axis (distributed/finalize_model_grads.py).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        if config.normalization not in ("RMSNorm", "LayerNorm"):
            raise ValueError(f"normalization {config.normalization!r} is neither RMSNorm nor LayerNorm")
        self.shape = (hidden_size,)
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        marks(self.weight).sequence_parallel = config.sequence_parallel
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
            marks(self.bias).sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.bias is None:
            if cpu_linear.in_rollout(x):
                from megatron_ext.layers import cpu_kernels  # which imports a compiler

                return cpu_kernels.rms_norm(x, weight, self.eps)
            return F.rms_norm(x, self.shape, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, self.bias, self.eps)


class WideNorm(torch.nn.Module):
    """Normalises queries or keys by RMSNorm over all heads together, those of other tensor ranks included (OLMo 2)."""

    def __init__(self, config: TransformerConfig, heads: int, group: dist.ProcessGroup):
        """Make the weights of this tensor rank's share of `heads`, which is even."""
        super().__init__()
        self.group, self.eps, self.width = group, config.layernorm_epsilon, heads * config.kv_channels
        self.weight = torch.nn.Parameter(torch.ones(self.width // group.size(), dtype=config.params_dtype))
        marks(self.weight).tensor_model_parallel = group.size() > 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., heads / t, d] normalised."""
        flat = x.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.group.size() > 1:  # what each rank makes of the sum has a part in its gradient
            squares = copy_to_tensor_model_parallel_region(
                reduce_from_tensor_model_parallel_region(squares, group=self.group), group=self.group
            )
        return (self.weight * (flat * torch.rsqrt(squares / self.width + self.eps))).to(x.dtype).view(x.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the weights, cut over tensor ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class BareNorm(torch.nn.Module):
    """Normalises by RMSNorm without weights (NanoChat)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.shape = (hidden_size,)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.shape, eps=self.eps)
