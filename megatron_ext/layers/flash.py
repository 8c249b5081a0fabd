"""Torch's FlashAttention-2 kernel over sequences that lie one after the other, with sliding windows and sinks.

It takes each document of a packed row as it lies there: no padding, no masks, and fewer key-value heads than query
heads. A query sees the keys up to itself, where the last query of a sequence stands at its last key; so decoding over a
cache and the chunks of context parallelism are further cases of the same call.

A sink is a logit s of each head in the softmax's denominator that has no value. The kernel knows none, but it gives
the logarithm L of that denominator for each query. With a sink it is L' = log(exp(L) + exp(s)), and the output is
out' = out exp(L - L'). Backward needs no more: the kernel's takes out' and L' for its own and then gives exactly the
gradients of the softmax with the sink, for it makes the weights anew as exp(score - L') and subtracts <dout, out'>. The
sink's own gradient is the sum over queries of -exp(s - L') <dout, out'>.

The operations are torch's own, without a promise about their form; tests/gpu_rehearsal compares their schemas with
those this file was written for (torch 2.13), and plays the kernel with the checks of its flash_api.cpp. Backward adds
up in no fixed order unless torch.use_deterministic_algorithms is on. Not yet run on a GPU.

Letters of shapes: T and K numbers of queries and keys in a row, n sequences, d size of a head.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megatron_ext.layers.documents import Spans

Capability = tuple[int, int]  # of a GPU, as CUDA counts: (9, 0) is an H100

HALVES = (torch.bfloat16, torch.float16)
DTYPES: tuple[torch.dtype, ...] = HALVES  # that the kernel takes; its stand-in in tests takes others
BF16_SINCE: Capability = (8, 0)  # and FlashAttention-2
LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8
_NOT_BACKWARD = range(193, 225)  # head sizes whose backward pass some GPUs have no room for (sdp_utils.cpp)
_MOST_SEQUENCES = 65535  # the second axis of a CUDA grid


@functools.cache
def capability(target: torch.device) -> Capability | None:
    """Return the compute capability of an NVIDIA GPU, None for any other device."""
    if target.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(target)


def refusal(dtype: torch.dtype, head_size: int, sequences: int, gpu: Capability | None) -> str:
    """Return why the kernel cannot take queries of this form, in words that follow "because"; "" where it can."""
    if gpu is None:
        return "this is no NVIDIA GPU"
    if gpu < BF16_SINCE:
        return f"the GPU has compute capability {gpu[0]}.{gpu[1]}, and it needs 8.0"
    if dtype not in DTYPES:
        return f"it knows bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_size > LARGEST_HEAD or head_size % _HEAD_MULTIPLE or head_size in _NOT_BACKWARD:
        return f"it has no heads of {head_size}"
    if sequences > _MOST_SEQUENCES:
        return f"it takes {_MOST_SEQUENCES} sequences at once, not {sequences}"
    return ""


def usable(query: torch.Tensor, sequences: int) -> bool:
    """Return whether the kernel takes `query` [..., d] in so many sequences."""
    return not refusal(query.dtype, query.size(-1), sequences, capability(query.device))


def has_block_tables() -> bool:
    """Return whether this release of torch lets the kernel read keys and values in blocks (2.13 does)."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    return any(argument.name == "block_table" for argument in schema.arguments)


def _sight(window: int | None) -> dict[str, Any]:
    """Return how the kernel is told that a query sees the keys up to its own, or the last `window` of them.

    Causal, it would set the right border itself. With a window it is told both borders: causal and a left border
    together are no case of torch's own calls (torch/nn/attention/varlen.py).
    """
    if window is None:
        return dict(is_causal=True, window_size_left=-1, window_size_right=-1)
    return dict(is_causal=False, window_size_left=window - 1, window_size_right=0)


class Asked(NamedTuple):
    """What a call asks besides tensors that have gradients: `window` is in tokens, the query's own included."""

    spans: Spans
    scale: float
    window: int | None = None


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    asked: Asked,
    sinks: torch.Tensor | None = None,
    **over_blocks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention [T, heads, d], and the logarithm of the softmax's denominators, fp32 [heads, T].

    query [T, heads, d], key and value [K, groups, d], `sinks` [heads]; no gradients. `over_blocks`: `seqused_k` int32
    [n], the keys of each sequence that count; `block_table` int32 [n, most], the blocks of each, where key and value
    are [blocks, block size, groups, d].
    """
    spans = asked.spans
    out, log_sum = torch.ops.aten._flash_attention_forward(
        query=query,
        key=key,
        value=value,
        cum_seq_q=spans.queries,
        cum_seq_k=spans.keys,
        max_q=spans.longest_queries,
        max_k=spans.longest_keys,
        dropout_p=0.0,
        return_debug_mask=False,
        scale=asked.scale,
        **_sight(asked.window),
        **over_blocks,
    )[:2]
    return (out, log_sum) if sinks is None else with_sinks(out, log_sum, sinks)


def with_sinks(out: torch.Tensor, log_sum: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `out` [T, heads, d] and `log_sum` [heads, T] of a softmax that has `sinks` [heads] besides its keys."""
    column = sinks.detach().to(log_sum.dtype)[:, None]
    total = torch.logaddexp(log_sum, column)
    share = (log_sum - total).exp().transpose(0, 1)[..., None]  # [T, heads, 1]
    return (out * share).to(out.dtype), total


class _Flash(torch.autograd.Function):
    """Attends, with gradients of queries, keys, values and sinks."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, asked: Asked
    ) -> torch.Tensor:
        out, log_sum = forward(query, key, value, asked, sinks)
        ctx.asked = asked
        ctx.save_for_backward(query, key, value, sinks, out, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, out, log_sum = ctx.saved_tensors
        spans = ctx.asked.spans
        grad = grad.contiguous()
        grads = torch.ops.aten._flash_attention_backward(
            grad_out=grad,
            query=query,
            key=key,
            value=value,
            out=out,
            logsumexp=log_sum,
            cum_seq_q=spans.queries,
            cum_seq_k=spans.keys,
            max_q=spans.longest_queries,
            max_k=spans.longest_keys,
            dropout_p=0.0,
            rng_state=torch.zeros(2, dtype=torch.uint64, device=query.device),  # of a dropout that there is not
            unused=torch.empty(0, device=query.device),
            scale=ctx.asked.scale,
            **_sight(ctx.asked.window),
        )
        of_sinks = None
        if sinks is not None:
            inner = (grad.to(log_sum.dtype) * out.to(log_sum.dtype)).sum(-1).transpose(0, 1)  # [heads, T]
            of_sinks = -((sinks.to(log_sum.dtype)[:, None] - log_sum).exp() * inner).sum(-1).to(sinks.dtype)
        return *grads, of_sinks, None


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: Asked, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Attend within each sequence: query [T, heads, d], key and value [K, groups, d] -> [T, heads, d].

    Whether the kernel takes them is asked before (`usable`). `sinks` [heads]. All four get gradients.
    """
    return _Flash.apply(query, key, value, sinks, asked)
