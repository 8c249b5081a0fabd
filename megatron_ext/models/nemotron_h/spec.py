"""Nemotron-H as a megatron-core model: configuration, layer spec, hybrid model."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_ext import versions
from megatron_ext.layers.loss_head import SupervisedHybrid
from megatron_ext.layers.mamba import MambaMixer, MambaMixerSubmodules
from megatron_ext.layers.moe import moe_spec
from megatron_ext.layers.norm import Norm
from megatron_ext.models import decoder_spec
from megatron_ext.models.nemotron_h.config import Dims
from megatron_ext.parallel.parts import OURS, TE, Parts
from megatron_ext.parallel.plan import ParallelPlan, padded_rows


def transformer_config(
    dims: Dims, plan: ParallelPlan, dtype: torch.dtype, parts: Parts = OURS, options: Mapping[str, Any] = {}
) -> TransformerConfig:
    return decoder_spec.configured(
        options,
        num_layers=dims.layers,
        hidden_size=dims.hidden,
        num_attention_heads=dims.heads or plan.tensor,
        num_query_groups=dims.kv_groups or plan.tensor,
        kv_channels=dims.head_dim or 1,
        ffn_hidden_size=dims.ffn or plan.tensor,
        gated_linear_unit=False,
        activation_func=squared_relu,
        normalization="RMSNorm",
        layernorm_epsilon=dims.norm_epsilon,
        add_bias_linear=False,
        is_hybrid_model=True,
        mamba_num_heads=dims.mamba_heads or None,
        mamba_head_dim=dims.mamba_head_dim or 1,
        mamba_num_groups=dims.mamba_groups or 1,
        mamba_state_dim=dims.mamba_state or 1,
        **(_experts(dims, parts) if "E" in dims.pattern else {}),
        **decoder_spec.settings(plan, dtype, parts) | _cuts(plan) | decoder_spec.NO_ACTIVATION_FUSION,
    )


def _cuts(plan: ParallelPlan) -> dict[str, Any]:
    """Return the fields that cut the pattern: MambaStack reads the numbers of layers at the ends, between they are
    equal.
    """
    if not plan.pipeline_layers:
        return {}
    return dict(
        pipeline_model_parallel_layout=None,
        num_layers_in_first_pipeline_stage=plan.pipeline_layers[0],
        num_layers_in_last_pipeline_stage=plan.pipeline_layers[-1],
    )


def _experts(dims: Dims, parts: Parts) -> dict[str, Any]:
    return dict(
        num_moe_experts=dims.experts,
        moe_router_topk=dims.top_k,
        moe_ffn_hidden_size=dims.expert_ffn,
        moe_shared_expert_intermediate_size=dims.shared_ffn,
        moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=dims.routed_scale,
        moe_router_num_groups=dims.expert_groups if dims.expert_groups > 1 else None,
        moe_router_group_topk=dims.top_groups if dims.expert_groups > 1 else None,
        moe_router_dtype="fp32",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.0,  # mcore's default of 1e-3 rewrites the imported biases at every step
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=parts.experts == TE,
    )


class HybridStack(MambaStack):
    """MambaStack with `recompute: full`, which mcore 0.16 leaves to its GPT models: a layer at a time."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **others: Any,
    ) -> torch.Tensor:
        if self.config.recompute_granularity != "full" or not self.training:
            return super().forward(hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **others)
        hidden_states = hidden_states if self.pre_process else self.input_tensor

        def through(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            out = layer(hidden_states=x, attention_mask=None, packed_seq_params=packed_seq_params)
            return out[0] if isinstance(out, tuple) else out  # transformer layers return a context too

        for layer in self.layers:
            hidden_states = tensor_parallel.checkpoint(partial(through, layer), False, hidden_states)
        return self.final_norm(hidden_states) if self.post_process and self.post_layer_norm else hidden_states


class TorchHybridStack(HybridStack):
    """With a final norm of ours: mcore's is Transformer Engine's, whatever the spec says."""

    def __init__(self, config: TransformerConfig, submodules: MambaStackSubmodules, **others: Any):
        super().__init__(config, submodules, post_layer_norm=False, **others)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = Norm(config, config.hidden_size, eps=config.layernorm_epsilon)


def stack_spec(config: TransformerConfig, parts: Parts) -> ModuleSpec:
    """Return the layers of each kind of block."""
    made_of = decoder_spec.modules(parts)
    epsilon = {} if versions.release().mamba_norm_has_epsilon else {"eps": config.layernorm_epsilon}
    norm = IdentityOp if made_of.fused else ModuleSpec(module=made_of.norm, params=epsilon)
    mamba = MambaLayerSubmodules(
        norm=norm,
        mixer=ModuleSpec(
            module=MambaMixer,
            params={"norm_epsilon": config.layernorm_epsilon, "kernels": parts.mamba},
            submodules=MambaMixerSubmodules(in_proj=made_of.normed_column, out_proj=made_of.row),
        ),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    attention = TransformerLayerSubmodules(
        input_layernorm=made_of.norm_before,
        self_attention=decoder_spec.attention_spec(made_of),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=decoder_spec.BEFORE_ATTENTION,
    )
    dense = TransformerLayerSubmodules(
        pre_mlp_layernorm=made_of.norm_before,
        mlp=decoder_spec.mlp_spec(made_of),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=decoder_spec.BEFORE_MLP,
    )
    blocks = MambaStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=dense),
    )
    if config.num_moe_experts:
        experts = TransformerLayerSubmodules(
            pre_mlp_layernorm=made_of.norm,
            mlp=moe_spec(config.num_moe_experts, parts),
            mlp_bda=get_bias_dropout_add,
        )
        blocks.moe_layer = ModuleSpec(module=MoETransformerLayer, submodules=experts)
    return ModuleSpec(module=HybridStack if parts.norm == TE else TorchHybridStack, submodules=blocks)


def build(
    dims: Dims,
    plan: ParallelPlan,
    dtype: torch.dtype,
    parts: Parts = OURS,
    virtual_stage: int | None = None,
    options: Mapping[str, Any] = {},
) -> SupervisedHybrid:
    """Build this rank's part of the model, its weights not set. mcore's groups for `plan` must exist."""
    config = transformer_config(dims, plan, dtype=dtype, parts=parts, options=options)
    ends = decoder_spec.ends(virtual_stage)
    del ends["vp_stage"]  # hybrid models have no interleaved pipeline
    model = SupervisedHybrid(
        config,
        stack_spec(config, parts),
        vocab_size=padded_rows(dims.vocabulary, plan.tensor),
        max_sequence_length=dims.max_positions,
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
        **{versions.release().hybrid_pattern: dims.pattern},
        **ends,
    )
    model.vocabulary_rows = dims.vocabulary
    return model
