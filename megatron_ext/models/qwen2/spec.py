"""Qwen2 as a megatron-core model: configuration, layer spec, GPTModel."""

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_ext.layers.attention import PackedAttention, PackedSelfAttention
from megatron_ext.layers.loss_head import SupervisedHead
from megatron_ext.layers.norm import Norm
from megatron_ext.models import common
from megatron_ext.models.qwen2.config import Dims
from megatron_ext.parallel import ParallelPlan, padded_rows


def transformer_config(dims: Dims, plan: ParallelPlan, dtype: torch.dtype, backend: str) -> TransformerConfig:
    """mcore's configuration. `dtype` is that of the parameters, `backend` "torch" or "te"."""
    return TransformerConfig(
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
        add_qkv_bias=True,
        **common.settings(plan, dtype, backend),
    )


def layer_spec(
    config: TransformerConfig, backend: str, virtual_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """ "torch": mcore's local spec with our norms and packed attention. "te": mcore's stock spec, unchanged."""
    if backend == "te":
        return get_gpt_layer_with_transformer_engine_spec()
    if backend != "torch":
        raise ValueError(f'backend {backend!r} is neither "torch" nor "te"')
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = Norm
    layer.submodules.pre_mlp_layernorm = Norm
    layer.submodules.self_attention.module = PackedSelfAttention
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    layers = [layer] * get_num_layers_to_build(config, virtual_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm)


def build(
    dims: Dims, plan: ParallelPlan, dtype: torch.dtype, backend: str = "torch", virtual_stage: int | None = None
) -> SupervisedHead:
    """This rank's part of the model, its weights not set; of an interleaved pipeline, one of its stages. mcore's
    groups for `plan` must exist."""
    config = transformer_config(dims, plan, dtype, backend)
    model = SupervisedHead(
        config,
        layer_spec(config, backend, virtual_stage),
        vocab_size=padded_rows(dims.vocabulary, plan.tensor),
        max_sequence_length=dims.max_positions,
        share_embeddings_and_output_weights=dims.tied,
        position_embedding_type="rope",
        rotary_base=dims.rope_base,
        **common.ends(virtual_stage),
    )
    model.vocabulary_rows = dims.vocabulary
    return model
