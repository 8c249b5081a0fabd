"""Rotary position embedding, as the fused kernels compute it."""

import torch

from transformer_engine.stand_in import not_here


def apply_rotary_pos_emb(
    t,
    freqs,
    tensor_format="sbhd",
    start_positions=None,
    interleaved=False,
    fused=False,
    cu_seqlens=None,
    cp_size=1,
    cp_rank=0,
):
    """Rotate t [T, heads, d] ("thd") or [S, B, heads, d] ("sbhd") by the angles freqs [positions, 1, 1, d].

    Like the fused kernel it knows cosines and sines of unit length only: YaRN's factor is not applied.
    """
    assert tensor_format != "thd" or cu_seqlens is not None, "cu_seqlens must not be None when tensor_format is 'thd'."
    if fused:
        return _fused(t, freqs, start_positions, tensor_format, interleaved, cu_seqlens, cp_size, cp_rank)
    return not_here("unfused rotary embedding")


def _fused(t, freqs, start_positions, tensor_format, interleaved, cu_seqlens, cp_size, cp_rank):
    if freqs.dtype != torch.float32:
        freqs = freqs.float()
    assert tensor_format in ("sbhd", "bshd", "thd"), f"Unsupported tensor_format: {tensor_format}."
    if (
        tensor_format == "bshd"
        or start_positions is not None
        or interleaved
        or (cp_size > 1 and tensor_format != "thd")
    ):
        not_here(f"rotary embedding of {tensor_format} over {cp_size} context ranks")
    if tensor_format == "thd":
        lengths = (cu_seqlens // cp_size).diff().tolist()  # of a rank's share: fused_rope.cu divides the boundaries
        angles = torch.cat([freqs[_positions(length, cp_size, cp_rank), 0] for length in lengths])
    else:
        angles = freqs[: t.size(0)]
    width = freqs.size(-1)
    turned, left = t[..., :width].float(), t[..., width:]
    first, second = turned.chunk(2, -1)
    turned = turned * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
    return torch.cat([turned.to(t.dtype), left], -1)


def _positions(length, cp_size, cp_rank):
    """Return where the tokens of a rank's share of a document stand in it: chunks `rank` and 2 * size - 1 - rank."""
    if cp_size == 1:
        return torch.arange(length)
    half = length // 2
    first = torch.arange(half) + cp_rank * half
    return torch.cat([first, torch.arange(length - half) + length * cp_size - (cp_rank + 1) * half])


def apply_fused_qkv_rotary_pos_emb(
    qkv,
    q_freqs,
    k_freqs,
    qkv_split_arg_list,
    tensor_format="sbhd",
    start_positions=None,
    interleaved=False,
    cu_seqlens=None,
    cp_size=1,
    cp_rank=0,
):
    not_here("apply_fused_qkv_rotary_pos_emb")
