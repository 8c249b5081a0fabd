"""Qwen2, Qwen3 or Llama as a megatron-core model: configuration and GPTModel."""

from typing import Any, Mapping

import torch
from megatron.core.transformer import TransformerConfig

from megatron_ext.layers.loss_head import SupervisedHead
from megatron_ext.models import common
from megatron_ext.models.qwen2.config import Dims
from megatron_ext.parallel import ParallelPlan, padded_rows


def transformer_config(
    dims: Dims, plan: ParallelPlan, dtype: torch.dtype, backend: str, options: Mapping[str, Any] = {}
) -> TransformerConfig:
    """mcore's configuration. `dtype` is that of the parameters, `backend` "torch" or "te"."""
    return common.configured(
        options,
        num_layers=dims.layers,
        hidden_size=dims.hidden,
        ffn_hidden_size=dims.ffn,
        num_attention_heads=dims.heads,
        num_query_groups=dims.kv_groups,
        kv_channels=dims.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=dims.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=dims.qkv_bias,
        qk_layernorm=dims.qk_norm,
        **common.settings(plan, dtype, backend),
    )


def build(
    dims: Dims,
    plan: ParallelPlan,
    dtype: torch.dtype,
    backend: str = "torch",
    virtual_stage: int | None = None,
    options: Mapping[str, Any] = {},
) -> SupervisedHead:
    """This rank's part of the model, its weights not set; of an interleaved pipeline, one of its stages. mcore's
    groups for `plan` must exist."""
    config = transformer_config(dims, plan, dtype, backend, options)
    model = SupervisedHead(
        config,
        common.decoder_spec(config, backend, virtual_stage),
        vocab_size=padded_rows(dims.vocabulary, plan.tensor),
        max_sequence_length=dims.max_positions,
        share_embeddings_and_output_weights=dims.tied,
        position_embedding_type="rope",
        rotary_base=dims.rope_base,
        rope_scaling=dims.rope_factor > 0,
        rope_scaling_factor=dims.rope_factor,
        **common.ends(virtual_stage),
    )
    model.vocabulary_rows = dims.vocabulary
    return model
