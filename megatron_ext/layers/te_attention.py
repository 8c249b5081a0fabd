"""Transformer Engine's attention for the packed rows of training, and ours for the tokens of a rollout.

TE's kernels take whole documents; they know nothing of the keys and values that a rollout holds in blocks
(rollout/cache.py). Both see the same window and sinks and scale the scores alike. Import it only where Transformer
Engine is installed. Not yet run on a GPU.
"""

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_ext.layers.attention import over_cache, scale_of, window_of


class TEPackedAttention(TEDotProductAttention):
    """Serves as `core_attention` of PackedSelfAttention: mcore's TEDotProductAttention, but for a rollout's rows."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **others: Any,
    ):
        super().__init__(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            softmax_scale=softmax_scale,
            **others,
        )
        self.mask_type = attn_mask_type
        self.scale, self.window = scale_of(config, softmax_scale), window_of(config, layer_number)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_splits: int | None = None,
    ) -> torch.Tensor:
        """Attend: packed, [T / c, heads, d] -> [T / c, heads * d]; otherwise [s, b, heads, d] -> [s, b, heads * d]."""
        if getattr(packed_seq_params, "cache", None) is not None:
            return over_cache(self, packed_seq_params, query=query, key=key, value=value)
        return super().forward(
            query=query,
            key=key,
            value=value,
            attention_mask=attention_mask,
            attn_mask_type=self.mask_type if attn_mask_type is None else attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
            num_splits=num_splits,
        )
