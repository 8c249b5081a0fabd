"""NanoChat as a megatron-core model: configuration and GPTModel, with the norm after the embedding and capped logits."""

from typing import Any, Mapping

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer import TransformerConfig

from data_tools.mistake import Problem, UserMistake
from megatron_ext.layers.loss_head import SupervisedHead, capped
from megatron_ext.layers.norm import BareNorm
from megatron_ext.models import common
from megatron_ext.models.nanochat.config import Dims
from megatron_ext.parallel import ParallelPlan, padded_rows


def transformer_config(
    dims: Dims, plan: ParallelPlan, dtype: torch.dtype, backend: str, options: Mapping[str, Any] = {}
) -> TransformerConfig:
    """mcore's configuration. `dtype` is that of the parameters."""
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
        activation_func=squared_relu,
        add_bias_linear=False,
        qk_layernorm=True,  # before the rotation, where NanoChat has it after: a rotation changes no norm
        **common.settings(plan, dtype, backend),
    )


class NanoChat(SupervisedHead):
    """The parts that GPTModel has no option for hang on its modules, so that names and checkpoints are GPTModel's."""

    def __init__(self, config: TransformerConfig, *args: Any, logit_cap: float, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.logit_cap = logit_cap
        if self.pre_process:
            norm = BareNorm(config, config.hidden_size, config.layernorm_epsilon)
            self.embedding.register_forward_hook(lambda _module, _inputs, hidden: norm(hidden))
        if self.post_process:
            self.output_layer.register_forward_hook(lambda _module, _inputs, out: (capped(out[0], logit_cap), out[1]))


def build(
    dims: Dims,
    plan: ParallelPlan,
    dtype: torch.dtype,
    backend: str = "torch",
    virtual_stage: int | None = None,
    options: Mapping[str, Any] = {},
) -> NanoChat:
    """This rank's part of the model, its weights not set; of an interleaved pipeline, one of its stages. mcore's
    groups for `plan` must exist. UserMistake for "te", whose norms all have weights."""
    if backend == "te":
        raise UserMistake(Problem("backend", "'te' has no norms without weights, as nanochat's are: use torch"))
    config = transformer_config(dims, plan, dtype, backend, options)
    model = NanoChat(
        config,
        common.decoder_spec(config, backend, virtual_stage, norm=BareNorm),
        vocab_size=padded_rows(dims.vocabulary, plan.tensor),
        max_sequence_length=dims.max_positions,
        share_embeddings_and_output_weights=dims.tied,
        position_embedding_type="rope",
        rotary_base=dims.rope_base,
        logit_cap=dims.logit_cap,
        **common.ends(virtual_stage),
    )
    model.vocabulary_rows = dims.vocabulary
    return model
