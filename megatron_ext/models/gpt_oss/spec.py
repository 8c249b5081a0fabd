"""gpt-oss as a megatron-core model: configuration and GPTModel."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer import TransformerConfig

from megatron_ext.layers.loss_head import SupervisedHead
from megatron_ext.layers.marks import marks
from megatron_ext.models import decoder_spec
from megatron_ext.models.gpt_oss.config import Dims
from megatron_ext.parallel.parts import OURS, Parts
from megatron_ext.parallel.plan import ParallelPlan


def transformer_config(
    dims: Dims, plan: ParallelPlan, dtype: torch.dtype, parts: Parts = OURS, options: Mapping[str, Any] = {}
) -> TransformerConfig:
    shared = decoder_spec.decoder_fields(dims, plan, dtype, parts) | dict(
        apply_rope_fusion=False,  # the fused kernel for packed rows drops YaRN's factor (rope_utils.py:289)
        bias_dropout_fusion=False,
    )
    config = decoder_spec.configured(
        options,
        add_bias_linear=True,  # of router and experts too
        softmax_type="learnable",
        window_size=(dims.window - 1, 0) if any(dims.sliding) else None,  # tokens to the left
        window_attn_skip_freq=[int(sliding) for sliding in dims.sliding],
        gated_linear_unit=True,
        activation_func=quick_gelu,
        activation_func_clamp_value=dims.swiglu_limit,
        glu_linear_offset=1.0,
        moe_router_score_function="softmax",
        moe_router_pre_softmax=False,  # softmax over the chosen
        **decoder_spec.routed(dims.experts, dims.top_k, dims.ffn, parts),
        **shared,
    )
    if dims.yarn is not None:
        decoder_spec.set_yarn(config, dims.yarn)
    return config


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
    positions = "yarn" if dims.yarn else "rope"
    model = decoder_spec.decoder(
        SupervisedHead,
        config,
        dims,
        plan=plan,
        parts=parts,
        virtual_stage=virtual_stage,
        position_embedding_type=positions,
    )
    _mark_distinct(model)
    return model


def _mark_distinct(model: torch.nn.Module) -> None:
    """Mark sinks and expert biases as different on each tensor rank (biases need expert_tensor 1).

    Neither mcore nor Transformer Engine does, and the gradient norm would count those of one rank only.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("softmax_offset") or (".experts." in name and "bias" in name):
            marks(parameter).tensor_model_parallel = True
