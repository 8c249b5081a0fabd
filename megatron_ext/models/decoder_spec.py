"""What the families' specs of mcore's layers share: the part of mcore's configuration that a parallel plan decides; of
models of GPT's form, with layers of attention followed by an MLP or experts, nearly all.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine as te
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_ext.layers.attention import PackedAttention, PackedSelfAttention
from megatron_ext.layers.decoder_layer import DecoderLayer
from megatron_ext.layers.loss_head import SupervisedHead
from megatron_ext.layers.moe import moe_spec
from megatron_ext.layers.norm import Norm
from megatron_ext.models.rotary import Yarn
from megatron_ext.parallel.parts import TE, Parts
from megatron_ext.parallel.plan import ParallelPlan, padded_rows

RECOMPUTE: dict[str, dict[str, Any]] = {  # what ParallelPlan.recompute means to mcore
    "none": {},
    "selective": dict(recompute_granularity="selective", recompute_modules=["mlp", "moe"]),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}

NO_ACTIVATION_FUSION = dict(bias_activation_fusion=False)  # mcore refuses it for a squared ReLU (its config, line 1487)


class DecoderDims(Protocol):
    """What the Dims of all families of GPT's form have; sizes in elements."""

    @property
    def layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def ffn(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_groups(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def tied(self) -> bool: ...
    @property
    def norm_epsilon(self) -> float: ...
    @property
    def rope_base(self) -> float: ...
    @property
    def max_positions(self) -> int: ...


def settings(plan: ParallelPlan, dtype: torch.dtype, parts: Parts) -> dict[str, Any]:
    """Return the fields of TransformerConfig that plan and parts decide. `dtype` is that of the parameters."""
    return dict(
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        tensor_model_parallel_size=plan.tensor,
        sequence_parallel=plan.sequence_parallel,
        context_parallel_size=plan.context,
        cp_comm_type=plan.context_comm,
        expert_model_parallel_size=plan.expert,
        expert_tensor_parallel_size=plan.expert_tensor,
        **_pipeline(plan, dtype),
        **RECOMPUTE[plan.recompute],
        # Every weight comes from a checkpoint: no time is spent on random numbers. (perform_initialization=False would
        # also leave out the marks of tensor-parallel parameters, and gradient norms would miss
        # all ranks but the first.)
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        # Compiled extras of Apex, of Transformer Engine, and of mcore for linear layers that leave out their bias.
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=parts.attention == TE,
        bias_activation_fusion=parts.linear == TE,
        bias_dropout_fusion=parts.linear == TE,
    )


def configured(options: Mapping[str, Any], **fields: Any) -> TransformerConfig:
    """Make mcore's configuration of `fields`, with those of `options` instead where both say something."""
    if "attention_backend" in options:
        options = {**options, "attention_backend": AttnBackend[options["attention_backend"]]}
    return TransformerConfig(**{**fields, **options})


def routed(experts: int, top_k: int, ffn: int, parts: Parts) -> dict[str, Any]:
    """Return the fields of TransformerConfig of experts that are not dropped or balanced."""
    return dict(
        num_moe_experts=experts,
        moe_router_topk=top_k,
        moe_ffn_hidden_size=ffn,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=parts.experts == TE,
    )


def by_sigmoid(scale: float, groups: int, top_groups: int) -> dict[str, Any]:
    """Return the fields of TransformerConfig of a router with sigmoid scores and a correction bias (routing.py)."""
    return dict(
        moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=scale,
        moe_router_num_groups=groups if groups > 1 else None,
        moe_router_group_topk=top_groups if groups > 1 else None,
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.0,  # mcore's default of 1e-3 rewrites the imported biases at every step
    )


def set_yarn(config: TransformerConfig, yarn: Yarn) -> None:
    """Set what mcore reads off the configuration, which has no such fields (gpt_model.py:172-190)."""
    config.yarn_rotary_scaling_factor = yarn.factor
    config.yarn_original_max_position_embeddings = yarn.original_positions
    config.yarn_beta_fast = yarn.beta_fast
    config.yarn_beta_slow = yarn.beta_slow
    config.yarn_mscale = config.yarn_mscale_all_dim = None
    config.yarn_correction_range_round_to_int = yarn.truncate


def without_yarn(config: TransformerConfig) -> TransformerConfig:
    """Return a copy for layers whose positions are not stretched."""
    plain = copy.copy(config)
    for name in [name for name in vars(plain) if name.startswith("yarn_")]:
        delattr(plain, name)
    return plain


def decoder_fields(dims: DecoderDims, plan: ParallelPlan, dtype: torch.dtype, parts: Parts) -> dict[str, Any]:
    """Return the fields of TransformerConfig of a model of GPT's form with RMSNorm. `dtype` is the parameters'."""
    return dict(
        num_layers=dims.layers,
        hidden_size=dims.hidden,
        ffn_hidden_size=dims.ffn,
        num_attention_heads=dims.heads,
        num_query_groups=dims.kv_groups,
        kv_channels=dims.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=dims.norm_epsilon,
        **settings(plan, dtype, parts),
    )


def decoder(
    kind: type[SupervisedHead],
    config: TransformerConfig,
    dims: DecoderDims,
    *,
    plan: ParallelPlan,
    parts: Parts,
    virtual_stage: int | None,
    norm: type[torch.nn.Module] = Norm,
    norm_before: bool = True,
    **own: Any,
) -> Any:
    """Build this rank's part of a model of GPT's form, its weights not set; of an interleaved pipeline, one of its
    stages.

    mcore's groups for `plan` must exist. `norm_before` says whether blocks have a norm before them, `own` are further
    arguments of `kind`.
    """
    arguments = dict(
        vocab_size=padded_rows(dims.vocabulary, plan.tensor),
        max_sequence_length=dims.max_positions,
        share_embeddings_and_output_weights=dims.tied,
        position_embedding_type="rope",
        rotary_base=dims.rope_base,
    )
    layers = decoder_spec(config, modules(parts, norm), parts, virtual_stage, norm_before)
    model = kind(config, layers, **{**arguments, **own}, **ends(virtual_stage))
    model.vocabulary_rows = dims.vocabulary
    return model


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _pipeline(plan: ParallelPlan, dtype: torch.dtype) -> dict[str, Any]:
    if plan.pipeline == 1:
        return {}
    interleaved = plan.virtual > 1
    return dict(
        pipeline_model_parallel_size=plan.pipeline,
        virtual_pipeline_model_parallel_size=plan.virtual if interleaved else None,
        pipeline_model_parallel_layout=_layout(plan.pipeline_layers) if plan.pipeline_layers else None,
        pipeline_dtype=dtype,
        # Two stages of a rank pair send at once. Batched sends between the same pair mix them up without an error:
        # wrong gradients at pipeline 2 (seen with megatron-core 0.16.1).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
    )


def _layout(layers: list[int]) -> list[list[str]]:
    """Return mcore's names of what each stage holds, in model order."""
    stages = [["decoder"] * count for count in layers]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def ends(virtual_stage: int | None) -> dict[str, Any]:
    """Return the arguments of mcore's models that say which end of the pipeline this stage is.

    `virtual_stage` is None without virtual stages.
    """
    return dict(
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage),
        vp_stage=virtual_stage,
    )


@dataclass(frozen=True)
class Modules:
    """The classes that a layer is assembled from."""

    attention: type  # the core
    column: type
    row: type
    norm: type
    fused: type | None  # a norm and the column-parallel layer after it in one; None where they are two

    @property
    def normed_column(self) -> type:
        """The layer after a norm."""
        return self.fused or self.column

    @property
    def norm_before(self) -> type:
        """The norm before `normed_column`."""
        return IdentityOp if self.fused else self.norm


def modules(parts: Parts, norm: type[torch.nn.Module] = Norm) -> Modules:
    """Return the classes of a layer's parts. `norm` is ours, with the model's weights or without."""
    attention: type = PackedAttention
    if parts.attention == TE:
        from megatron_ext.layers.te_attention import TEPackedAttention

        attention = TEPackedAttention
    linear = parts.linear == TE
    return Modules(
        attention,
        column=te.TEColumnParallelLinear if linear else ColumnParallelLinear,
        row=te.TERowParallelLinear if linear else RowParallelLinear,
        norm=te.TENorm if parts.norm == TE else norm,
        fused=te.TELayerNormColumnParallelLinear if linear and parts.norm == TE else None,
    )


# Checkpoints name a norm as Transformer Engine does, which fuses it into the next layer: the same for all parts.
BEFORE_ATTENTION = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
BEFORE_MLP = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def attention_spec(made_of: Modules, qk_norm: bool = False) -> ModuleSpec:
    """Return `self_attention` of a layer, with norms of queries and keys where the model has some."""
    of_heads = made_of.norm if qk_norm else IdentityOp
    return ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=made_of.normed_column,
            core_attention=made_of.attention,
            linear_proj=made_of.row,
            q_layernorm=of_heads,
            k_layernorm=of_heads,
        ),
    )


def mlp_spec(made_of: Modules) -> ModuleSpec:
    """Return `mlp` of a layer without experts."""
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=made_of.normed_column, linear_fc2=made_of.row))


def decoder_spec(
    config: TransformerConfig,
    made_of: Modules,
    parts: Parts,
    virtual_stage: int | None = None,
    norm_before: bool = True,
) -> TransformerBlockSubmodules:
    """Return the layers of attention and MLP, or experts where `config` has them: in all layers, or in those that its
    list moe_layer_freq says. Without `norm_before` nothing is normalised before a block.
    """
    experts, last = config.num_moe_experts, made_of.norm
    listed = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else [1] * config.num_layers
    if not norm_before:
        made_of = replace(made_of, norm=IdentityOp, fused=None)

    def layer(routed: bool) -> ModuleSpec:
        renamed = BEFORE_ATTENTION if routed else BEFORE_ATTENTION | BEFORE_MLP
        submodules = TransformerLayerSubmodules(
            input_layernorm=made_of.norm_before,
            self_attention=attention_spec(made_of, config.qk_layernorm),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=made_of.norm if routed else made_of.norm_before,  # no part fuses a norm into experts
            mlp=moe_spec(experts, parts) if routed else mlp_spec(made_of),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=renamed if norm_before else {},
        )
        return ModuleSpec(module=DecoderLayer, submodules=submodules)

    first = get_transformer_layer_offset(config, virtual_stage)
    here = listed[first : first + get_num_layers_to_build(config, virtual_stage)]
    kinds = {routed: layer(routed) for routed in {bool(experts and each) for each in here}}
    return TransformerBlockSubmodules(layer_specs=[kinds[bool(experts and each)] for each in here], layer_norm=last)
