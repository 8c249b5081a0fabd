"""What the families' specs of mcore's layers share: the part of mcore's configuration that a parallel plan decides; of
models of GPT's form, with layers of attention followed by an MLP or experts, nearly all.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_ext.layers.attention import PackedAttention, PackedSelfAttention
from megatron_ext.layers.loss_head import SupervisedHead
from megatron_ext.layers.moe import moe_spec
from megatron_ext.layers.norm import Norm
from megatron_ext.parallel.plan import ParallelPlan, padded_rows

RECOMPUTE: dict[str, dict[str, Any]] = {  # what ParallelPlan.recompute means to mcore
    "none": {},
    "selective": dict(recompute_granularity="selective", recompute_modules=["mlp", "moe"]),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}


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


def settings(plan: ParallelPlan, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """Return the fields of TransformerConfig that a plan decides. `dtype` is that of the parameters, `backend` "torch"
    or "te".
    """
    fused = backend == "te"
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
        # Compiled extras of Apex and Transformer Engine.
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=fused,
        apply_rope_fusion=fused,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
    )


def configured(options: Mapping[str, Any], **fields: Any) -> TransformerConfig:
    """Make mcore's configuration of `fields`, with those of `options` instead where both say something."""
    if "attention_backend" in options:
        options = {**options, "attention_backend": AttnBackend[options["attention_backend"]]}
    return TransformerConfig(**{**fields, **options})


def decoder_fields(dims: DecoderDims, plan: ParallelPlan, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """Return the fields of TransformerConfig of a model of GPT's form with RMSNorm.

    `dtype` is that of the parameters, `backend` "torch" or "te".
    """
    return dict(
        num_layers=dims.layers,
        hidden_size=dims.hidden,
        ffn_hidden_size=dims.ffn,
        num_attention_heads=dims.heads,
        num_query_groups=dims.kv_groups,
        kv_channels=dims.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=dims.norm_epsilon,
        **settings(plan, dtype, backend),
    )


def decoder(
    kind: type[SupervisedHead],
    config: TransformerConfig,
    dims: DecoderDims,
    *,
    plan: ParallelPlan,
    backend: str,
    virtual_stage: int | None,
    norm: type[torch.nn.Module] = Norm,
    **own: Any,
) -> Any:
    """Build this rank's part of a model of GPT's form, its weights not set; of an interleaved pipeline, one of its
    stages.

    mcore's groups for `plan` must exist. `own` are further arguments of `kind`.
    """
    arguments = dict(
        vocab_size=padded_rows(dims.vocabulary, plan.tensor),
        max_sequence_length=dims.max_positions,
        share_embeddings_and_output_weights=dims.tied,
        position_embedding_type="rope",
        rotary_base=dims.rope_base,
    )
    layers = decoder_spec(config, backend, virtual_stage, norm)
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


def decoder_spec(
    config: TransformerConfig, backend: str, virtual_stage: int | None = None, norm: type[torch.nn.Module] = Norm
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the layers of attention and MLP, or experts where `config` has them.

    "torch": mcore's local spec with our norms, packed attention and experts. "te": mcore's stock spec with attention
    that knows a rollout's cache.
    """
    if backend == "te":
        from megatron_ext.layers.te_attention import TEPackedAttention  # only where Transformer Engine is installed

        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        attention = layer.submodules.self_attention
        attention.module, attention.submodules.core_attention = PackedSelfAttention, TEPackedAttention
        return layer
    if backend != "torch":
        raise ValueError(f'backend {backend!r} is neither "torch" nor "te"')
    layer = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    parts, attention = layer.submodules, layer.submodules.self_attention
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    attention.module, attention.submodules.core_attention = PackedSelfAttention, PackedAttention
    if config.qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = norm
    if config.num_moe_experts:
        parts.mlp = moe_spec(config.num_moe_experts)
        # No spec fuses this norm into experts: checkpoints keep its name (mcore's map says otherwise).
        parts.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    layers = [layer] * get_num_layers_to_build(config, virtual_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
