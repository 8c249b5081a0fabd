"""A model of GPT's form as megatron-core has it: configuration, GPTModel, and what hangs on its layers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig

from megatron_ext.layers.loss_head import SupervisedHead
from megatron_ext.layers.norm import WideNorm
from megatron_ext.models import decoder_spec
from megatron_ext.models.qwen2.config import Dims
from megatron_ext.models.rotary import Linear, Yarn
from megatron_ext.parallel.parts import OURS, Parts
from megatron_ext.parallel.plan import ParallelPlan


def transformer_config(
    dims: Dims, plan: ParallelPlan, dtype: torch.dtype, parts: Parts = OURS, options: Mapping[str, Any] = {}
) -> TransformerConfig:
    fields = decoder_spec.decoder_fields(dims, plan, dtype, parts)
    if isinstance(dims.stretch, Yarn) or dims.partial != 1 or any(dims.no_rope):
        fields["apply_rope_fusion"] = False  # the fused kernel drops YaRN's factor (rope_utils.py:289)
    if any(dims.sliding):
        fields |= dict(window_size=(dims.window - 1, 0), window_attn_skip_freq=[int(each) for each in dims.sliding])
    config = decoder_spec.configured(
        options,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=dims.qkv_bias,
        qk_layernorm=dims.qk_norm == "head",
        softmax_scale=dims.attention_multiplier or None,
        no_rope_freq=[int(each) for each in dims.no_rope] or None,
        **(_experts(dims, parts) if dims.experts else {}),
        **fields,
    )
    if isinstance(dims.stretch, Yarn):
        decoder_spec.set_yarn(config, dims.stretch)
    return config


def _experts(dims: Dims, parts: Parts) -> dict[str, Any]:
    kind = dims.of_kind.experts
    assert kind is not None
    fields = decoder_spec.routed(dims.experts, dims.top_k, dims.routed_ffn, parts)
    fields["moe_layer_freq"] = [int(not dims.is_dense(i)) for i in range(dims.layers)]
    if kind.sigmoid:
        fields |= decoder_spec.by_sigmoid(dims.routed_scaling_factor, dims.expert_groups, dims.top_groups)
    else:  # a softmax over all, or over the chosen: the same as to normalise
        fields |= dict(moe_router_score_function="softmax", moe_router_pre_softmax=not dims.norm_topk_prob)
    if kind.shared:
        fields |= dict(moe_shared_expert_intermediate_size=dims.shared_ffn)
        fields |= dict(moe_shared_expert_gate=bool(kind.shared_gate))
    return fields


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
    own: dict[str, Any] = {}
    if isinstance(dims.stretch, Yarn):
        own["position_embedding_type"] = "yarn"
    if isinstance(dims.stretch, Linear):
        own["seq_len_interpolation_factor"] = dims.stretch.factor
    model: SupervisedHead = decoder_spec.decoder(
        SupervisedHead,
        config,
        dims,
        plan=plan,
        parts=parts,
        virtual_stage=virtual_stage,
        rope_scaling=dims.rope_factor > 0,
        rope_scaling_factor=dims.rope_factor,
        rotary_percent=dims.partial,
        norm_before=bool(dims.of_kind.norms.before_attention),
        **own,
    )
    for layer in model.decoder.layers:
        _complete(layer, dims, config, parts)
    if model.pre_process and dims.embedding_multiplier != 1:
        model.embedding.register_forward_hook(lambda _module, _inputs, out: out * dims.embedding_multiplier)
    if model.post_process and dims.logits_scaling != 1:
        model.decoder.final_layernorm.register_forward_hook(lambda _module, _inputs, out: out / dims.logits_scaling)
    return model


def _complete(layer: Any, dims: Dims, config: TransformerConfig, parts: Parts) -> None:
    """Hang on a layer what mcore has no option for: norms after its blocks and over all heads, a factor of what blocks
    give, and in windows the positions as they are where those of other layers are stretched (OLMo 3).
    """
    attention, norms = layer.self_attention, dims.of_kind.norms
    if dims.qk_norm == "all":
        attention.q_layernorm, attention.k_layernorm = (
            WideNorm(config, heads, attention.pg_collection.tp) for heads in (dims.heads, dims.kv_groups)
        )
    if dims.of_kind.windows == "types" and dims.sliding and dims.sliding[layer.layer_number - 1] and dims.is_stretched:
        attention.config = decoder_spec.without_yarn(config)
        attention._yarn_concentration_factor = 1.0  # which megatron-core keeps from 0.19 on (attention.py:326)
        attention.own_rotary = RotaryEmbedding(dims.head_dim, rotary_percent=1.0, rotary_base=dims.rope_base)
    after = {"post_self_attn_layernorm": norms.after_attention, "post_mlp_layernorm": norms.after_mlp}
    for (name, has), block in zip(after.items(), (attention, layer.mlp)):
        if has:
            of = decoder_spec.modules(parts).norm
            setattr(layer, name, of(config=config, hidden_size=dims.hidden, eps=dims.norm_epsilon))
        if has or dims.residual_multiplier != 1:
            block.register_forward_hook(_ended(getattr(layer, name, None), dims.residual_multiplier))


def _ended(norm: torch.nn.Module | None, factor: float) -> Callable[..., tuple[torch.Tensor, Any]]:
    """Return a hook that normalises what a block gives, where there is a `norm` for it, and multiplies it."""

    def end(_block: Any, _inputs: Any, given: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        out, bias = given
        out = out if norm is None else norm(out)
        return (out if factor == 1 else out * factor), bias

    return end
