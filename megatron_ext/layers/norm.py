"""RMSNorm and LayerNorm in torch, for layer specs without Transformer Engine.

mcore's own torch norms refuse sequence parallelism and zero-centred scales (transformer/torch_norm.py:25-36).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

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
            return F.rms_norm(x, self.shape, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, self.bias, self.eps)


class BareNorm(torch.nn.Module):
    """Normalises by RMSNorm without weights (NanoChat)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.shape = (hidden_size,)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.shape, eps=self.eps)
