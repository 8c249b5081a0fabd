"""Which kernel takes what is asked for."""

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from transformer_engine.pytorch.utils import get_device_compute_capability
from transformer_engine.stand_in import not_here


@dataclass
class AttentionParams:
    """What the choice of a kernel depends on."""

    qkv_type: Any = torch.Tensor
    qkv_dtype: Any = torch.bfloat16
    qkv_layout: Any = "sbh3d"
    batch_size: Any = 1
    num_heads: Any = 16
    num_gqa_groups: Any = 16
    max_seqlen_q: Any = 128
    max_seqlen_kv: Any = 128
    head_dim_qk: Any = 64
    head_dim_v: Any = 64
    attn_mask_type: Any = "no_mask"
    window_size: Any = None
    alibi_slopes_shape: Any = None
    core_attention_bias_type: Any = "no_bias"
    core_attention_bias_shape: Any = "1hss"
    core_attention_bias_requires_grad: Any = True
    pad_between_seqs: Any = False
    attention_dropout: Any = 0.0
    context_parallel: Any = False
    cp_comm_type: Any = "p2p"
    deterministic: Any = False
    is_training: Any = True
    fp8: Any = False
    fp8_meta: Any = None
    inference_params: Any = None
    softmax_type: Any = "vanilla"
    return_max_logit: Any = False
    cuda_graph: Any = False
    num_splits: Any = 1


def get_attention_backend(attention_params=None):
    """Return (flash, its version, fused, its number, unfused, [each]) of the kernels that take these parameters.

    The filters are the release's own statements, without its log; those that need FP8, a bias, a KV cache or another
    GPU than an H100 are left out. flash-attn is not installed: the extra `gpu` does not name it.
    """
    qkv_dtype, num_splits = attention_params.qkv_dtype, attention_params.num_splits
    qkv_format = "thd" if attention_params.qkv_layout.startswith("t") else "sbhd"
    softmax_type, fp8, fp8_meta = attention_params.softmax_type, attention_params.fp8, attention_params.fp8_meta
    context_parallel, cp_comm_type = attention_params.context_parallel, attention_params.cp_comm_type
    device_compute_capability = get_device_compute_capability()
    use_flash_attention = False
    use_fused_attention = int(os.getenv("NVTE_FUSED_ATTN", "1"))
    use_unfused_attention = int(os.getenv("NVTE_UNFUSED_ATTN", "1"))
    if qkv_dtype not in [torch.bfloat16, torch.float16]:
        use_fused_attention = False
    if num_splits != 1:
        use_fused_attention = use_unfused_attention = False
    if qkv_format == "thd":
        if attention_params.pad_between_seqs:
            use_flash_attention = False
        if device_compute_capability == (12, 0):
            use_fused_attention = False
    if softmax_type != "vanilla":
        use_flash_attention = False
        if fp8 and fp8_meta["recipe"].fp8_dpa:
            use_fused_attention = False
            use_unfused_attention = False
        if qkv_format == "thd":
            use_fused_attention = False
            use_unfused_attention = False
        if context_parallel:
            use_unfused_attention = False
            if cp_comm_type != "a2a":
                use_fused_attention = False
    if context_parallel and use_unfused_attention:
        use_unfused_attention = False
    use_fused_attention, use_unfused_attention = bool(use_fused_attention), bool(use_unfused_attention)
    if use_fused_attention:
        use_unfused_attention = False
    every = [use_flash_attention, use_fused_attention, use_unfused_attention]
    return use_flash_attention, None, use_fused_attention, int(use_fused_attention), use_unfused_attention, every


def check_set_window_size(attn_mask_type, window_size=None):
    """Return the window (tokens to the left, to the right; -1: all) that the kind of mask allows."""
    orig_window_size = window_size
    if "causal" in attn_mask_type:
        if orig_window_size is None:
            window_size = (-1, 0)
        elif orig_window_size == (-1, -1) or (orig_window_size[0] >= 0 and orig_window_size[1] != 0):
            window_size = (orig_window_size[0], 0)
            warnings.warn(
                "window_size should be (-1, 0) or (>=0, 0) for attn_mask_type=" + attn_mask_type, stacklevel=2
            )
        elif orig_window_size != (-1, 0) and (orig_window_size[0] < 0 or orig_window_size[1] != 0):
            raise AssertionError("window_size should be (-1, 0) or (>=0, 0) for attn_mask_type=" + attn_mask_type)
    else:
        not_here(f"attention with mask {attn_mask_type}")
    return window_size
