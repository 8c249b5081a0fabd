"""Qwen2, Qwen3 or Llama as a megatron-core model: configuration and GPTModel."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_ext.layers.loss_head import SupervisedHead
from megatron_ext.models import decoder_spec
from megatron_ext.models.qwen2.config import Dims
from megatron_ext.parallel.parts import OURS, Parts
from megatron_ext.parallel.plan import ParallelPlan


def transformer_config(
    dims: Dims, plan: ParallelPlan, dtype: torch.dtype, parts: Parts = OURS, options: Mapping[str, Any] = {}
) -> TransformerConfig:
    return decoder_spec.configured(
        options,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=dims.qkv_bias,
        qk_layernorm=dims.qk_norm,
        **decoder_spec.decoder_fields(dims, plan, dtype, parts),
    )


def build(
    dims: Dims,
    plan: ParallelPlan,
    dtype: torch.dtype,
    parts: Parts = OURS,
    virtual_stage: int | None = None,
    options: Mapping[str, Any] = {},
) -> SupervisedHead:
    """Build this rank's part of the model, as decoder_spec.decoder does."""
    config = transformer_config(dims, plan, dtype=dtype, parts=parts, options=options)
    return decoder_spec.decoder(
        SupervisedHead,
        config,
        dims,
        plan=plan,
        parts=parts,
        virtual_stage=virtual_stage,
        rope_scaling=dims.rope_factor > 0,
        rope_scaling_factor=dims.rope_factor,
    )
