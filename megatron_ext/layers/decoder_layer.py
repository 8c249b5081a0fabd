"""A decoder layer that knows the short way through itself which a rollout takes."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_ext import cpu_linear


class DecoderLayer(TransformerLayer):
    """Gives mcore's TransformerLayer a shorter way through a rollout's row, whose steps cost what their calls cost.

    Same parameters, same function, the same modules called: only what serves gradients, recomputation, offloading and
    other inference is left out. Whatever else is asked of the layer takes mcore's way.
    """

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        config = self.config
        self.is_swiglu = (
            type(self.mlp) is MLP
            and config.gated_linear_unit
            and config.activation_func is F.silu
            and config.activation_func_clamp_value is None
            and not config.glu_linear_offset
            and not config.use_te_activation_func
        )

    def forward(self, hidden_states: torch.Tensor, *args: Any, **others: Any) -> Any:
        """Return (hidden states [T, 1, h] after the layer, None) of hidden_states [T, 1, h]."""
        row, angles = others.get("packed_seq_params"), others.get("rotary_pos_emb")
        asked = sum(argument is not None for argument in (*args, *others.values()))
        in_rollout = getattr(row, "cache", None) is not None and not torch.is_grad_enabled()
        if not in_rollout or asked > 1 + (angles is not None):
            return super().forward(hidden_states, *args, **others)
        x = self.input_layernorm(hidden_states)
        x = self.self_attention(x, None, rotary_pos_emb=angles, packed_seq_params=row)
        hidden_states = self._added(self.self_attn_bda, x, hidden_states)
        x = self._fed(self.pre_mlp_layernorm(hidden_states))
        return self._added(self.mlp_bda, x, hidden_states), None

    def _fed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what `mlp` does of x [T, 1, h], and a bias that is not added yet.

        On CPU SwiGLU is one call. Hooks that a family hung on the MLP (a norm after it) are heard: then it is called.
        """
        if not self.is_swiglu or cpu_linear.is_heard(self.mlp) or not cpu_linear.in_rollout(x):
            return self.mlp(x)
        from megatron_ext.layers import cpu_kernels  # which imports a compiler

        both, bias = self.mlp.linear_fc1(x)
        return self.mlp.linear_fc2(cpu_kernels.swiglu(both if bias is None else both + bias))

    def _added(self, add: Any, out: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor) -> torch.Tensor:
        """Return what mcore's `add` (bias, dropout, add) does, whose plain form takes many calls for two sums."""
        if self.config.bias_dropout_fusion or out[0].dtype != residual.dtype:
            return add(self.training, self.config.bias_dropout_fusion)(out, residual, self.hidden_dropout)
        return residual + (out[0] if out[1] is None else out[0] + out[1])
