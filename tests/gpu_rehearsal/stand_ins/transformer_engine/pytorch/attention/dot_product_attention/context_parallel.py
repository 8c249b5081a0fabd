"""Attention over context ranks: the whole row is gathered on each, which keeps what it asked for."""

import torch
import torch.distributed as dist

from transformer_engine.pytorch.constants import dist_group_type
from transformer_engine.pytorch.distributed import get_distributed_world_size
from transformer_engine.stand_in import attend, not_here


def attn_forward_func_with_cp(
    is_training,
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_kv,
    max_seqlen_q,
    max_seqlen_kv,
    cu_seqlens_q_padded,
    cu_seqlens_kv_padded,
    dropout_p,
    cp_group,
    cp_global_ranks,
    cp_stream,
    cp_comm_type,
    softmax_scale=None,
    qkv_format="bshd",
    attn_mask_type="causal",
    attn_bias_type="no_bias",
    attn_bias=None,
    deterministic=False,
    use_fused_attention=False,
    window_size=None,
    fp8=False,
    fp8_meta=None,
    quantizers=None,
    pad_between_seqs=False,
    use_flash_attn_3=False,
    softmax_type="vanilla",
    softmax_offset=None,
    fp8_output=False,
    layer_number=1,
    return_max_logit=False,
):
    """Attend within each document: q [T / c, heads, d], k and v [T / c, groups, d] -> [T / c, heads * d].

    A rank of c holds two of the 2 c chunks of each document (_own).
    """
    if cp_comm_type == "a2a+p2p" or fp8:
        not_here("hierarchical context parallelism, and FP8")
    assert isinstance(cp_group, dist_group_type), f"cp_group must be {dist_group_type} type for {cp_comm_type=}!"
    assert qkv_format in ["bshd", "sbhd", "thd"], f"Context parallelism does not support {qkv_format=}!"
    assert qkv_format != "sbhd" or use_fused_attention, (
        "Context parallelism does not support FlashAttention backend with qkv_format = 'sbhd'!"
    )
    assert attn_bias is None or (use_fused_attention and "padding" not in attn_mask_type), (
        "Context parallelism only supports attention bias with FusedAttention backend and non-padding mask types!"
    )
    assert qkv_format != "thd" or (cu_seqlens_q_padded is not None and cu_seqlens_kv_padded is not None), (
        "cu_seqlens_padded can not be None for context parallelism and qkv_format = 'thd'!"
    )
    sliding_window_attn = window_size is not None and window_size != (-1, 0) and window_size != (-1, -1)
    assert not sliding_window_attn or cp_comm_type in ["a2a", "all_gather"], (
        "Context parallelism does not support sliding window attention with {cp_comm_type=}!"
    )
    _check_kernels(softmax_type, use_fused_attention, cp_comm_type, qkv_format)
    if cp_comm_type not in ["p2p", "all_gather", "a2a"]:
        raise ValueError(f"Unsupported communication type: {cp_comm_type}!")
    padding = "padding" in attn_mask_type
    if cp_comm_type == "all_gather":
        assert not padding, f"{attn_mask_type} mask type is not supported!"
        assert qkv_format != "thd", f"{qkv_format} format is not supported!"
    if cp_comm_type == "a2a":
        assert not padding or qkv_format == "thd", f"{attn_mask_type} mask type is not supported for BSHD and SBHD!"
        assert attn_bias_type == "no_bias", f"{attn_bias_type} bias type is not supported!"
        _check_heads(q, k, get_distributed_world_size(cp_group), qkv_format.index("t"))
    bounds, size = cu_seqlens_q_padded.tolist(), get_distributed_world_size(cp_group)
    own = [_own(bounds, size, rank) for rank in range(size)]
    back = torch.cat(own).argsort()
    whole = (_Gather.apply(x, cp_group)[back] for x in (q, k, v))
    out = attend(*whole, bounds=bounds, left=window_size[0], scale=softmax_scale)
    return out[own[dist.get_rank(cp_group)]]


def _check_kernels(softmax_type, use_fused_attention, cp_comm_type, qkv_format):
    assert softmax_type == "vanilla" or use_fused_attention, (
        "Context parallelism only supports {softmax_type=} with FusedAttention backend!"
    )
    assert softmax_type == "vanilla" or cp_comm_type == "a2a", (
        "Context parallelism only supports {softmax_type=} with cp_comm_type = 'a2a'!"
    )
    assert softmax_type == "vanilla" or qkv_format != "thd", (
        "Context parallelism does not support {softmax_type=} with qkv_format = 'thd'!"
    )


def _check_heads(q, k, cp_size, seq_dim):
    assert q.shape[-1] % 8 == 0, "Hidden size per attention head should be multiple of 8!"
    assert q.shape[-2] % cp_size == 0 and k.shape[-2] % cp_size == 0, (
        "The number of attention heads needs to be divisible by CP size!"
    )
    assert q.shape[seq_dim] % 2 == 0 and k.shape[seq_dim] % 2 == 0, (
        "Sequence length per GPU needs to be divisible by 2!"
    )


class _Gather(torch.autograd.Function):
    """Gathers the parts of all ranks along the first dimension; backward adds up what each rank asks of a part."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None


def _own(bounds, size, rank):
    """Return the tokens that a rank holds: of each document chunks `rank` and 2 * size - 1 - rank."""
    found = []
    for start, end in zip(bounds[:-1], bounds[1:]):
        chunks = torch.arange(start, end).chunk(2 * size) if end > start else [torch.arange(0)] * 2 * size
        if len({len(chunk) for chunk in chunks}) > 1:
            not_here("a document that does not divide into the chunks of its ranks")
        found += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.cat(found)
