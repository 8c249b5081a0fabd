"""Transformer Engine's attention over packed rows, for the attention layer of ours. Not yet run on a GPU."""

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.enums import AttnMaskType


class TEPackedAttention(TEDotProductAttention):
    """Serves as `core_attention` where PackedAttention does, with Transformer Engine's kernels."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Attend as PackedAttention does: packed, [T / c, heads, d] -> [T / c, heads * d]."""
        kind = attn_mask_type or AttnMaskType.causal
        return super().forward(query, key, value, attention_mask, attn_mask_type=kind, **others)
