"""Depthwise convolutions that look back."""

import torch
import torch.nn.functional as F


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """Convolve x [B, channels, T] with weight [channels, width]; a document (seq_idx int32 [B, T]) sees only itself."""
    if activation not in [None, "silu", "swish"]:
        raise NotImplementedError("activation must be None, silu, or swish")
    if initial_states is not None or return_final_states or final_states_out is not None:
        raise NotImplementedError("the stand-in for causal-conv1d keeps no states")
    total = x.size(-1)
    out = x * weight[:, -1:]
    for back in range(1, min(weight.size(1), total)):
        earlier = F.pad(x, (back, 0))[..., :total]
        if seq_idx is not None:
            same = F.pad(seq_idx, (back, 0), value=-1)[:, :total] == seq_idx
            earlier = torch.where(same[:, None], earlier, 0.0)
        out = out + earlier * weight[:, -1 - back, None]
    if bias is not None:
        out = out + bias[:, None]
    return F.silu(out) if activation else out


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):
    raise NotImplementedError("the stand-in for causal-conv1d has causal_conv1d_update by name only")
