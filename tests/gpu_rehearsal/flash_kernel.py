"""Stand-ins for torch's attention on CUDA: FlashAttention's operations, registered for the CPU, with its checks, and
scaled_dot_product_attention, with the conditions of its fused kernels.

The operations' schemas are torch's own: a call that does not fit them fails. The checks are those of
mha_varlen_fwd and mha_varlen_bwd in torch's aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, each under
its own words, as commit 03b7c19dbe22 of pytorch's main branch has them; the tag of 2.13 itself was not at hand. What
they compute is written anew, slowly, sequence by sequence, in the precision of the query.

Like the kernel, it makes the weights of the backward pass from the log-sums that it is given, and leaves what it does
not compute unset: keys of no sequence get gradients that are no numbers.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ext.layers import flash, sdpa

EXACT = (torch.float32, torch.float64)  # what the stand-in takes besides, for comparisons that rounding does not blur
H100 = (9, 0)


class Sdpa:
    """scaled_dot_product_attention on a GPU: refuses what the one kernel that may run does not take.

    The conditions are those of can_use_flash_attention and can_use_mem_efficient_attention in torch's sdp_utils.cpp.
    """

    def __init__(self) -> None:
        self.backends: list[str] = []  # of each call

    def __call__(
        self, q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, scale: Any = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        cuda = torch.backends.cuda
        assert not cuda.math_sdp_enabled() and not cuda.cudnn_sdp_enabled(), "the math kernel may run"
        assert all(x.stride(-1) == 1 for x in (q, k, v)) and q.size(2) > 0
        alike = q.size(1) == k.size(1) and not enable_gqa
        if cuda.flash_sdp_enabled():
            assert not cuda.mem_efficient_sdp_enabled()
            assert attn_mask is None and q.dtype in flash.HALVES and q.size(3) <= 256
            assert not is_causal or q.size(2) == k.size(2)
        else:
            assert cuda.mem_efficient_sdp_enabled() and q.dtype in (torch.float32, torch.bfloat16)
            assert alike, "the efficient kernel takes no shared heads"
            assert q.size(3) % (16 // q.element_size()) == 0 and v.size(3) % (16 // q.element_size()) == 0
        self.backends.append("flash" if cuda.flash_sdp_enabled() else "efficient")
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )


class Played:
    """What was asked of the kernel, and which numbers it may be given."""

    def __init__(self, dtypes: tuple[torch.dtype, ...]):
        self.dtypes = dtypes
        self.forwards = self.backwards = self.paged = 0
        self.sdpa = Sdpa()


def _check(given: bool, words: str) -> None:
    if not given:
        raise RuntimeError(words)


def _check_inputs(played: Played, q: Any, k: Any, v: Any, ends: tuple[Any, Any], paged: bool) -> None:
    """Check what both passes check."""
    _check(q.dtype in played.dtypes, "FlashAttention only support fp16 and bf16 data type")
    _check(k.dtype == q.dtype, "query and key must have the same dtype")
    _check(v.dtype == q.dtype, "query and value must have the same dtype")
    for name, cu in zip(("cu_seqlens_q", "cu_seqlens_k"), ends):
        _check(cu.dtype == torch.int32, f"{name} must have dtype int32")
        _check(cu.is_contiguous(), f"{name} must be contiguous")
        _check(cu.shape == ends[0].shape, f"{name} must have shape (batch_size + 1)")
        _check(cu.numel() > 1, "batch size must be positive")
    _check(q.size(2) % 8 == 0, "head_size must be a multiple of 8, this is ensured by padding!")
    _check(q.size(2) <= 256, "FlashAttention forward only supports head dimension at most 256")
    _check(q.size(1) % k.size(-2) == 0, "Number of heads in key/value must divide number of heads in query")
    _check(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    _check(k.shape == v.shape and k.dim() == (4 if paged else 3), "k must have the shape of v")
    # What the kernel does not check, but reads or writes beyond: rows of no sequence, or sequences without rows.
    _check(int(ends[0][-1]) == q.size(0), f"{int(ends[0][-1])} queries of {q.size(0)}")


def _borders(is_causal: bool, left: int | None, right: int | None, longest: int) -> tuple[int, int]:
    """Return the window as the kernel reads it: set_params_fprop and the lines before it."""
    left, right = (-1 if border is None else border for border in (left, right))
    if is_causal:
        right = 0
    left, right = (-1 if border >= longest else border for border in (left, right))
    return left, right


def _seen(queries: int, keys: int, left: int, right: int) -> torch.Tensor:
    """Return bool [queries, keys]: the last query stands at the last key."""
    distance = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def _scores(q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """Return [heads, queries, keys]."""
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.size(1) // k.size(1), 1)) * scale
    return scores.masked_fill(~seen, -torch.inf)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return x in the precision in which the kernel adds up, or better."""
    return x if x.dtype in EXACT else x.float()


def _forward(played: Played) -> Any:
    def forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
        window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None,
        num_splits=None,
    ):  # fmt: skip
        _check(dropout_p == 0 and not return_debug_mask, "return_softmax is only supported when p_dropout > 0.0")
        _check(alibi_slopes is None and num_splits is None, "not rehearsed")
        _check_inputs(played, query, key, value, (cum_seq_q, cum_seq_k), paged=block_table is not None)
        if block_table is not None:
            _check(key.size(1) % 256 == 0, "Paged KV cache block size must be divisible by 256")
            _check(block_table.dtype == torch.int32, "block_table must have dtype torch.int32")
            _check(block_table.stride(-1) == 1, "block_table must have contiguous last dimension")
            _check(block_table.size(0) == len(cum_seq_q) - 1, "block_table must have shape (batch_size, most)")
            _check(seqused_k is not None, "without seqused_k the last block would count as full")
        if seqused_k is not None:
            _check(seqused_k.dtype == torch.int32, "seqused_k must have dtype int32")
            _check(seqused_k.is_contiguous(), "seqused_k must be contiguous")
            _check(seqused_k.shape == (len(cum_seq_q) - 1,), "seqused_k must have shape (batch_size)")
        played.forwards += 1
        played.paged += block_table is not None
        # A token a sequence is causal anyway, and the kernel may pack the heads of a group (flash_api.cpp).
        left, right = _borders(is_causal and max_q > 1, window_size_left, window_size_right, max_k)
        out, log_sum = torch.empty_like(query), _wide(query.new_empty(query.size(1), query.size(0)))
        for i, (a, b, c, d) in enumerate(_sequences(cum_seq_q, cum_seq_k)):
            _check(b - a <= max_q, f"a sequence of {b - a} queries, and max_q is {max_q}")
            k, v = (x.narrow(0, c, d - c) for x in (key, value)) if block_table is None else (
                x[block_table[i].long()].flatten(0, 1) for x in (key, value))  # fmt: skip
            used = d - c if seqused_k is None else int(seqused_k[i])
            _check(used <= max_k, f"a sequence of {used} keys, and max_k is {max_k}")
            q, k, v = (_wide(x) for x in (query[a:b], k[:used], v[:used]))
            scores = _scores(q, k, _seen(b - a, used, left, right), scale)
            log_sum[:, a:b] = scores.logsumexp(-1)
            v = v.repeat_interleave(q.size(1) // v.size(1), 1)
            out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(out.dtype)
        return out, log_sum, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), query.new_empty(0)

    return forward


def _sequences(queries: torch.Tensor, keys: torch.Tensor) -> list[tuple[int, int, int, int]]:
    queries, keys = queries.tolist(), keys.tolist()
    return list(zip(queries[:-1], queries[1:], keys[:-1], keys[1:]))


def _backward(played: Played) -> Any:
    def backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        _check_inputs(played, query, key, value, (cum_seq_q, cum_seq_k), paged=False)
        _check(out.dtype == query.dtype, "query and out must have the same dtype")
        _check(grad_out.dtype == query.dtype, "query and dout must have the same dtype")
        _check(grad_out.shape == out.shape == query.shape, "out must have the shape of q")
        # Not checked by the kernel, which reads fp32 [heads, total_q] from its pointer.
        _check(logsumexp.dtype == _wide(query).dtype and logsumexp.is_contiguous(), "logsumexp is read as it lies")
        _check(logsumexp.shape == (query.size(1), query.size(0)), "logsumexp must have shape (heads, total_q)")
        played.backwards += 1
        left, right = _borders(is_causal, window_size_left, window_size_right, max_k)
        grads = [torch.full_like(x, torch.nan) for x in (query, key, value)]
        share = query.size(1) // key.size(1)
        for a, b, c, d in _sequences(cum_seq_q, cum_seq_k):
            _check(b - a <= max_q and d - c <= max_k, "a sequence is longer than max_q or max_k")
            q, o, do = (_wide(x[a:b]) for x in (query, out, grad_out))
            k, v = (_wide(x[c:d]) for x in (key, value))
            weights = (_scores(q, k, _seen(b - a, d - c, left, right), scale) - logsumexp[:, a:b, None]).exp()
            of_weights = torch.einsum("qhd,khd->hqk", do, v.repeat_interleave(share, 1))
            inner = (do * o).sum(-1).transpose(0, 1)[..., None]
            of_scores = weights * (of_weights - inner) * scale
            of_q = torch.einsum("hqk,khd->qhd", of_scores, k.repeat_interleave(share, 1))
            of_k = torch.einsum("hqk,qhd->khd", of_scores, q)
            of_v = torch.einsum("hqk,qhd->khd", weights, do)
            grads[0][a:b] = of_q.to(query.dtype)
            grads[1][c:d], grads[2][c:d] = (x.unflatten(1, (-1, share)).sum(2).to(key.dtype) for x in (of_k, of_v))
        return tuple(grads)

    return backward


@contextlib.contextmanager
def played(dtypes: tuple[torch.dtype, ...] = EXACT, gpu: tuple[int, int] = H100) -> Iterator[Played]:
    """Let this process compute attention as on a GPU of this compute capability, with the kernel for `dtypes`; what
    that does not take, by scaled_dot_product_attention's.
    """
    kernel = Played(dtypes)
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward(kernel), "CPU")
    library.impl("_flash_attention_backward", _backward(kernel), "CPU")
    before = flash.capability, flash.DTYPES, sdpa.F
    functions = types.SimpleNamespace(scaled_dot_product_attention=kernel.sdpa, pad=F.pad)
    flash.capability, flash.DTYPES, sdpa.F = lambda target: gpu, dtypes, functions
    try:
        yield kernel
    finally:
        flash.capability, flash.DTYPES, sdpa.F = before
        library._destroy()
