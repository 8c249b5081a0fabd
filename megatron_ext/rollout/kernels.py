"""Attention of a step's tokens over keys and values in blocks: the seam between machines.

    CPU, a token a document     the blocks are read where they lie (numba)
    GPU with flash-attention    the same, by its block table; blocks of a multiple of 256 tokens
    elsewhere                   the blocks are gathered into a batch for torch's kernel (layers/attention.py)
"""

import functools
import importlib.util
from typing import Any, Callable, Optional

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
    window: Optional[int] = None,
    sinks: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """query [n, tokens, heads, d] at `positions` int64 [n, tokens] of documents whose keys and values are blocks
    `table` int64 [n, most] of [blocks, block size, groups, d] -> [n, tokens, heads, d].

    A token sees its document up to itself, or the last `window` tokens of that; `sinks` [heads] as in `attend`.
    """
    if query.is_cuda and _has_flash() and keys.size(1) % _FLASH_BLOCK == 0:
        return _flash(query, keys, values, table, positions, scale, window, sinks)
    if query.device.type == "cpu" and query.size(1) == 1:
        return _in_place(query, keys, values, table, positions, scale, window, sinks)
    size, blocks = keys.shape[2:], table.flatten()
    k, v = (held.index_select(0, blocks).view(len(table), -1, *size) for held in (keys, values))
    return attend(query, k, v, scale, window, sinks, positions)


@functools.cache
def _has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, positions: torch.Tensor,
    scale: float, window: Optional[int], sinks: Optional[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Its causal mask puts the last query at the last key, as here. It knows no sinks: they are one more term of the
    softmax's sum, whose logarithm it gives."""
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
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, positions: torch.Tensor,
    scale: float, window: Optional[int], sinks: Optional[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    found = torch.empty(query.shape[0], *query.shape[2:], dtype=torch.float32)
    kernel = _kernel(keys.dtype, query.size(2) // keys.size(2), query.size(3), keys.size(1))
    kernel(
        query.squeeze(1).float().contiguous().numpy(), _plain(keys), _plain(values), table.numpy(),
        positions.squeeze(1).numpy(), scale, 0 if window is None else window,
        numpy.empty(0, numpy.float32) if sinks is None else sinks.detach().float().numpy(), found.numpy(),
    )  # fmt: skip
    return found.unsqueeze(1).to(query.dtype)


def _plain(held: torch.Tensor) -> numpy.ndarray:
    """NumPy knows no bfloat16: its bits."""
    return held.view(torch.uint16).numpy() if held.dtype == torch.bfloat16 else held.numpy()


@functools.cache
def _kernel(dtype: torch.dtype, share: int, d: int, size: int) -> Callable[..., None]:
    """Compiled at first use, for keys and values of this type, `share` heads a group, of `d`, and blocks of `size`
    tokens. A document's numbers depend on no other's."""
    import llvmlite.ir
    from numba import njit, types
    from numba.extending import intrinsic

    @intrinsic
    def of_bits(typing, bits):  # type: ignore[no-untyped-def]
        wanted = llvmlite.ir.FloatType()
        return types.float32(types.uint32), lambda _, builder, __, args: builder.bitcast(args[0], wanted)

    @njit(inline="always")
    def widen(held):  # type: ignore[no-untyped-def]
        return of_bits(numpy.uint32(held) << numpy.uint32(16))  # a bfloat16 is the upper half of a float32

    @njit(inline="always")
    def same(held):  # type: ignore[no-untyped-def]
        return held

    read: Any = widen if dtype == torch.bfloat16 else same

    @njit(fastmath={"reassoc", "nsz", "contract"}, nogil=True, error_model="numpy")
    def kernel(query, keys, values, table, positions, scale, window, sinks, out):  # type: ignore[no-untyped-def]
        heads, groups = query.shape[1], keys.shape[2]
        weights = numpy.empty((positions.max() + 1, heads), numpy.float32)
        for i in range(len(query)):
            stop = positions[i] + 1
            start = max(0, stop - window) if window else 0
            for t in range(start, stop):  # in the order of memory: a token's groups lie side by side
                block, place = table[i, t // size], t % size
                for g in range(groups):
                    for h in range(g * share, (g + 1) * share):
                        product = numpy.float32(0)
                        for c in range(d):
                            product += query[i, h, c] * read(keys[block, place, g, c])
                        weights[t, h] = product * numpy.float32(scale)
            for h in range(heads):
                top = sinks[h] if len(sinks) else weights[start, h]
                for t in range(start, stop):
                    top = max(top, weights[t, h])
                total = numpy.exp(sinks[h] - top) if len(sinks) else numpy.float32(0)
                for t in range(start, stop):
                    weights[t, h] = numpy.exp(weights[t, h] - top)
                    total += weights[t, h]
                for t in range(start, stop):
                    weights[t, h] /= total
            out[i] = 0
            for t in range(start, stop):
                block, place = table[i, t // size], t % size
                for g in range(groups):
                    for h in range(g * share, (g + 1) * share):
                        weight = weights[t, h]
                        for c in range(d):
                            out[i, h, c] += weight * read(values[block, place, g, c])

    return kernel
