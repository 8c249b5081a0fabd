"""Causal attention of a batch of sequences by torch's scaled_dot_product_attention, with windows and sinks.

On a GPU that function falls back to its "math" kernel without a word, which writes all scores out: 8.6 GB for a layer
with a sliding window at 131k tokens. So the kernel is chosen here (`fused_kernel`), and no other may run:

"flash"      bf16 and fp16 without a mask; takes fewer key-value heads than query heads as they are
"efficient"  fp32, and whatever has a mask; keys and values are repeated for each query head

What neither takes is refused. On a CPU torch chooses. Not yet run on a GPU.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ext.layers import flash

SINK_COLUMNS = 8  # added to the head size; 1 would do, but GPU kernels want head sizes in eights
QUERY_BLOCK = 512  # queries at once against a longer cache of keys: bounds the mask


class FusedKernel(NamedTuple):
    """A kernel of torch's scaled_dot_product_attention on a GPU, and what its arguments have to be made into."""

    backend: SDPBackend
    repeats_groups: bool  # keys and values are repeated for each of the query heads that share them
    head_multiple: int  # the head size is filled up with zeros to a multiple of this


FLASH = FusedKernel(SDPBackend.FLASH_ATTENTION, repeats_groups=False, head_multiple=1)
# 16 bytes of fp32 are 4 columns, of bf16 8. Newer releases of torch take shared heads too; 2.13 may not.
EFFICIENT = FusedKernel(SDPBackend.EFFICIENT_ATTENTION, repeats_groups=True, head_multiple=8)


def fused_kernel(dtype: torch.dtype, head_size: int, masked: bool, gpu: flash.Capability) -> FusedKernel:
    """Return the kernel for queries, keys and values of `dtype` on a GPU of this compute capability.

    The conditions are those of torch's sdp_utils.cpp (can_use_flash_attention, can_use_mem_efficient_attention).

    Raises:
        NotImplementedError: only the "math" kernel could take them.
    """
    halves = dtype in flash.HALVES and gpu >= flash.BF16_SINCE
    if halves and not masked and head_size <= flash.LARGEST_HEAD:
        return FLASH
    if halves or dtype in (torch.float32, torch.float16):
        return EFFICIENT
    raise NotImplementedError(
        f"no fused attention kernel of torch takes {dtype} on a GPU of compute capability {gpu[0]}.{gpu[1]}: "
        "use dtype float32, or a GPU of 8.0 or newer for bfloat16"
    )


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Run torch's kernel on [batch, tokens, heads, d]; causal where no mask is given: [(batch, 1,) queries, keys]."""
    size, gpu = q.size(-1), flash.capability(q.device)
    only: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if gpu is not None:
        kernel = fused_kernel(q.dtype, size, mask is not None, gpu)
        only = sdpa_kernel(kernel.backend)
        if kernel.repeats_groups and q.size(2) != k.size(2):
            k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
        if lacking := -size % kernel.head_multiple:
            q, k, v = (F.pad(x, (0, lacking)) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.size(1) != k.size(1)
    with only:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
        )
    return out.transpose(1, 2)[..., :size]


def _with_sinks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add sinks [heads] as a token before the first: every query scores it sinks[head], and its value is zero.

    That is the learnable logit in the softmax's denominator, for any kernel and with its gradient. Needs one column
    more in the head size; gets SINK_COLUMNS.
    """
    column = (sinks / scale).to(q.dtype).view(1, 1, -1, 1).expand(*q.shape[:-1], 1)
    q = torch.cat([q, column, q.new_zeros(()).expand(*q.shape[:-1], SINK_COLUMNS - 1)], dim=-1)
    k, v = (F.pad(x, (0, SINK_COLUMNS, 0, 0, 1, 0)) for x in (k, v))
    k[:, 0, :, v.size(-1) - SINK_COLUMNS] = 1
    return q, k, v


def _seen(
    rows: torch.Tensor, columns: torch.Tensor, window: int | None, sink: bool, like: torch.Tensor
) -> torch.Tensor:
    """Return the additive mask [..., queries, keys (+ 1)]: 0 where a query at rows [..., queries] sees a key at columns
    [keys].
    """
    rows = rows[..., None]
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    mask = like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    return F.pad(mask, (1, 0)) if sink else mask


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attend with as many keys as queries and no window."""
    if sinks is None:
        return _sdpa(q, k, v, scale)
    q_, k_, v_ = _with_sinks(q, k, v, sinks=sinks, scale=scale)
    return _sdpa(F.pad(q_, (0, 0, 0, 0, 1, 0)), k_, v_, scale)[:, 1:, :, : v.size(-1)]


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attend with the mask of `_seen`."""
    size = v.size(-1)
    if sinks is not None:
        q, k, v = _with_sinks(q, k, v, sinks=sinks, scale=scale)
    return _sdpa(q, k, v, scale=scale, mask=mask)[..., :size]


def _windowed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attend with as many keys as queries, in blocks of `window` tokens: a block sees itself and the one before."""
    batch, length = q.shape[:2]
    first = _causal(q[:, :window], k[:, :window], v[:, :window], scale=scale, sinks=sinks)
    blocks = -(-length // window) - 1  # after the first
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, (blocks + 1) * window - length)) for x in (q, k, v))
    own = q[:, window:].reshape(batch * blocks, window, *q.shape[2:])
    by_block = (x.view(batch, blocks + 1, window, *x.shape[2:]) for x in (k, v))
    keys, values = (torch.cat([x[:, :-1], x[:, 1:]], dim=2).flatten(0, 1) for x in by_block)  # [.., 2 * window, ...]
    places = torch.arange(2 * window, device=q.device)
    mask = _seen(places[window:], places, window=window, sink=sinks is not None, like=q)
    rest = _masked(own, keys, values, scale=scale, mask=mask, sinks=sinks).reshape(
        batch, blocks * window, *first.shape[2:]
    )
    return torch.cat([first, rest[:, : length - window]], dim=1)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute causal attention of a batch of whole sequences, in memory linear in their length; with a window, time
    too.

    q [batch, length, heads, d], k and v [batch, keys, kv_heads, d] -> [batch, length, heads, d]. The queries stand at
    `positions` int64 [batch, length], or are the last `length` of the keys' (fewer than keys when decoding from a
    cache). A token sees the last `window` tokens, itself included, or all. `sinks` [heads] are logits without a value
    (gpt-oss).
    """
    length, keys = q.size(1), k.size(1)
    if length == keys and positions is None:
        if window is None or window >= length:
            return _causal(q, k, v, scale=scale, sinks=sinks)
        return _windowed(q, k, v, scale=scale, window=window, sinks=sinks)
    places = torch.arange(keys, device=q.device)
    rows = places[keys - length :] if positions is None else positions[:, None]
    outs, end = [], keys - length
    for part, at in zip(q.split(QUERY_BLOCK, dim=1), rows.split(QUERY_BLOCK, dim=-1)):
        end += part.size(1)
        seen = slice(0, keys)
        if positions is None:
            seen = slice(0 if window is None else max(0, end - part.size(1) - window + 1), end)
        mask = _seen(at, places[seen], window=window, sink=sinks is not None, like=q)
        outs.append(_masked(part, k[:, seen], v[:, seen], scale=scale, mask=mask, sinks=sinks))
    return torch.cat(outs, dim=1)
