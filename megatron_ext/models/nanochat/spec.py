"""NanoChat as a megatron-core model: configuration, and GPTModel with a norm after the embedding and capped logits."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer import TransformerConfig

from data_tools.mistake import Problem, UserMistake
from megatron_ext.layers.loss_head import SupervisedHead, capped
from megatron_ext.layers.norm import BareNorm
from megatron_ext.models import decoder_spec
from megatron_ext.models.nanochat.config import Dims
from megatron_ext.parallel.parts import OURS, TE, Parts
from megatron_ext.parallel.plan import ParallelPlan


def transformer_config(
    dims: Dims, plan: ParallelPlan, dtype: torch.dtype, parts: Parts = OURS, options: Mapping[str, Any] = {}
) -> TransformerConfig:
    return decoder_spec.configured(
        options,
        activation_func=squared_relu,
        add_bias_linear=False,
        qk_layernorm=True,  # before the rotation, where NanoChat has it after: a rotation changes no norm
        **decoder_spec.decoder_fields(dims, plan, dtype, parts) | decoder_spec.NO_ACTIVATION_FUSION,
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
    parts: Parts = OURS,
    virtual_stage: int | None = None,
    options: Mapping[str, Any] = {},
) -> NanoChat:
    """Build this rank's part of the model, as decoder_spec.decoder does.

    Raises:
        UserMistake: the norms are to be Transformer Engine's, which all have weights.
    """
    if parts.norm == TE:
        message = "Transformer Engine has no norms without weights, as nanochat's are: use backend auto"
        raise UserMistake(Problem("backend", message))
    config = transformer_config(dims, plan, dtype=dtype, parts=parts, options=options)
    return decoder_spec.decoder(
        NanoChat,
        config,
        dims,
        plan=plan,
        parts=parts,
        virtual_stage=virtual_stage,
        norm=BareNorm,
        logit_cap=dims.logit_cap,
    )
