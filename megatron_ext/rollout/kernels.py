"""Attention of a step's tokens over keys and values in blocks: the seam between machines.

CPU, a token a document     the blocks are read where they lie (numba)
GPU with flash-attention    the same, by its block table; blocks of a multiple of 256 tokens
elsewhere                   the blocks are gathered into a batch for torch's kernel (layers/attention.py)

Shapes below: n documents with as many new tokens each; heads of size d, in groups that share keys and values.
"""

import functools
import importlib.util

import numpy
import torch

from megatron_ext.layers.attention import attend

_FLASH_BLOCK = 256  # flash_attn_with_kvcache (2.8): "page_block_size must be a multiple of 256"


def attend_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention [n, tokens, heads, d] of n documents' new tokens over what their blocks hold.

    query [n, tokens, heads, d]; keys and values [blocks, block size, groups, d]; `table` int64 [n, most], the blocks of
    each document; `positions` int64 [n, tokens], of the tokens in their documents; `sinks` [heads] as in `attend`.
    A token sees its document up to itself, or the last `window` tokens of that.
    """
    if query.is_cuda and _has_flash() and keys.size(1) % _FLASH_BLOCK == 0:
        return _flash(query, keys, values, table, positions=positions, scale=scale, window=window, sinks=sinks)
    if query.device.type == "cpu" and query.size(1) == 1:
        return _in_place(query, keys, values, table, positions=positions, scale=scale, window=window, sinks=sinks)
    size, blocks = keys.shape[2:], table.flatten()
    k, v = (held.index_select(0, blocks).view(len(table), -1, *size) for held in (keys, values))
    return attend(query, k, v, scale, window=window, sinks=sinks, positions=positions)


@functools.cache
def _has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, *, positions: torch.Tensor,
    scale: float, window: int | None, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return what `attend_blocks` does, by flash-attention.

    Its causal mask puts the last query at the last key, as here. It knows no sinks: they are one more term of the
    softmax's sum, whose logarithm it gives.
    """
    from flash_attn import flash_attn_with_kvcache

    out, log_sum = flash_attn_with_kvcache(
        query, keys, values, cache_seqlens=(positions[:, -1] + 1).int(), block_table=table.int(), softmax_scale=scale,
        causal=True, window_size=(-1, -1) if window is None else (window - 1, 0), return_softmax_lse=True,
    )  # fmt: skip
    if sinks is None:
        return out
    share = torch.sigmoid(log_sum - sinks.float()[:, None])  # [n, heads, tokens]
    return out * share.transpose(1, 2)[..., None].to(out.dtype)


def _in_place(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, *, positions: torch.Tensor,
    scale: float, window: int | None, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return what `attend_blocks` does for one token a document on CPU, without a copy of the blocks."""
    from megatron_ext.rollout.cpu_kernel import in_place

    out = torch.empty(query.shape[0], *query.shape[2:], dtype=torch.float32)
    kernel = in_place(query.size(2) // keys.size(2), query.size(3), keys.size(1))
    kernel(  # by position, as numba's code takes arguments
        query.squeeze(1).float().contiguous().numpy(), _plain(keys), _plain(values), table.numpy(),
        positions.squeeze(1).numpy(), scale, 0 if window is None else window,
        numpy.empty(0, numpy.float32) if sinks is None else sinks.detach().float().numpy(), out.numpy(),
    )  # fmt: skip
    return out.unsqueeze(1).to(query.dtype)


def _plain(held: torch.Tensor) -> numpy.ndarray:
    """Return a tensor of the cache as an array: of bfloat16, which NumPy does not know, its bits."""
    return held.view(torch.uint16).numpy() if held.dtype == torch.bfloat16 else held.numpy()
