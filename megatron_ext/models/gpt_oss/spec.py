"""gpt-oss as a megatron-core model: configuration and GPTModel."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer import TransformerConfig

from megatron_ext.layers.loss_head import SupervisedHead
from megatron_ext.layers.marks import marks
from megatron_ext.models import decoder_spec
from megatron_ext.models.gpt_oss.config import Dims, Yarn
from megatron_ext.parallel.parts import OURS, TE, Parts
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
        num_moe_experts=dims.experts,
        moe_ffn_hidden_size=dims.ffn,
        moe_router_topk=dims.top_k,
        moe_router_score_function="softmax",
        moe_router_pre_softmax=False,  # softmax over the chosen
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=parts.experts == TE,
        **shared,
    )
    if dims.yarn is not None:
        _set_yarn(config, dims.yarn)
    return config


def _set_yarn(config: TransformerConfig, yarn: Yarn) -> None:
    """Set what mcore reads off the configuration, which has no such fields (gpt_model.py:172-190)."""
    config.yarn_rotary_scaling_factor = yarn.factor
    config.yarn_original_max_position_embeddings = yarn.original_positions
    config.yarn_beta_fast = yarn.beta_fast
    config.yarn_beta_slow = yarn.beta_slow
    config.yarn_mscale = config.yarn_mscale_all_dim = None
    config.yarn_correction_range_round_to_int = yarn.truncate


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
