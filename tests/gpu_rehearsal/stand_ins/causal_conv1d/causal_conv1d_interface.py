"""Depthwise convolutions that look back, with what the release checks in Python and in C++ (csrc/causal_conv1d.cpp)."""

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
    if x.stride(2) != 1 and x.stride(1) != 1:
        x = x.contiguous()
    if seq_idx is not None:
        assert initial_states is None, "initial_states must be None if seq_idx is not None"
        assert not return_final_states, "If seq_idx is not None, we don't return final_states_out"
    if initial_states is not None or return_final_states or final_states_out is not None:
        raise NotImplementedError("the stand-in for causal-conv1d keeps no states")
    _check_layout(x, weight, bias, seq_idx)
    total, width = x.size(-1), weight.size(1)
    wide, taps = x.float(), weight.float()
    out = wide * taps[:, -1:]
    for back in range(1, min(width, total)):
        earlier = F.pad(wide, (back, 0))[..., :total]
        if seq_idx is not None:
            same = F.pad(seq_idx, (back, 0), value=-1)[:, :total] == seq_idx
            earlier = torch.where(same[:, None], earlier, 0.0)
        out = out + earlier * taps[:, -1 - back, None]
    if bias is not None:
        out = out + bias.float()[:, None]
    out = F.silu(out) if activation else out
    if seq_idx is not None:  # negative: padding
        out = torch.where(seq_idx[:, None] < 0, 0.0, out)
    return torch.empty_like(x).copy_(out)


def _check_layout(x, weight, bias, seq_idx):
    """Raise what the release's C++ raises, in its words."""
    dim, width = weight.shape
    if x.stride(1) == 1 and x.stride(2) > 1:
        if dim % 8 != 0:
            raise RuntimeError("causal_conv1d only supports channel dimension divisible by 8 for now")
        if x.stride(2) % 8 != 0 or x.stride(0) % 8 != 0:
            raise RuntimeError(
                "causal_conv1d with channel last layout requires strides (x.stride(0) and x.stride(2)) "
                "to be multiples of 8"
            )
    elif seq_idx is not None:
        raise RuntimeError("seq_idx is only supported for channel last layout")
    if width < 2 or width > 4:
        raise RuntimeError("causal_conv1d only supports width between 2 and 4")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(
            "input_type == at::ScalarType::Float || input_type == at::ScalarType::Half || "
            "input_type == at::ScalarType::BFloat16"
        )
    if bias is not None and bias.dtype != weight.dtype:
        raise RuntimeError("bias.scalar_type() == weight_type")
    if seq_idx is not None and seq_idx.dtype != torch.int32:
        raise RuntimeError("seq_idx.scalar_type() == torch::kInt32")


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):
    """Convolve the next input x [B, channels] of each row, and put it into conv_state [B, channels, width - 1]."""
    if activation not in [None, "silu", "swish"]:
        raise NotImplementedError("activation must be None, silu, or swish")
    if cache_seqlens is not None or conv_state_indices is not None or x.dim() != 2:
        raise NotImplementedError("the stand-in for causal-conv1d takes a token of each row, whose state is its own")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, conv_state, weight)):
        raise NotImplementedError("the stand-in for causal-conv1d: the release has no gradient here")
    width = weight.size(1)
    if width < 2 or width > 4:
        raise RuntimeError("causal_conv1d only supports width between 2 and 4")
    if conv_state.dtype != x.dtype:
        raise RuntimeError("conv_state.scalar_type() == input_type")
    if conv_state.size(2) < width - 1:
        raise RuntimeError("conv_state_len >= width - 1")
    seen = torch.cat([conv_state, x[..., None]], dim=-1)
    conv_state.copy_(seen[..., 1:])
    out = (seen[..., -width:].float() * weight.float()).sum(-1)
    out = out if bias is None else out + bias.float()
    return (F.silu(out) if activation else out).to(x.dtype)
