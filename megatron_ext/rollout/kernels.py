"""Attention of a step's tokens over keys and values in blocks: the seam between machines.

name                     where                                        how
torch flash, paged       GPU, blocks of a multiple of 256 tokens      torch's FlashAttention, by the block table
flash-attn, paged        the same, where torch has no block tables    flash-attention's, if it is installed
torch flash, gathered    GPU, other blocks                            the blocks side by side; only what is used is read
numba, in place          CPU, a token a document, fp32 or bf16        the blocks where they lie
sdpa, gathered           elsewhere                                    the blocks in a batch (layers/sdpa.py)

FlashAttention takes bfloat16 and float16 on GPUs since the A100 (layers/flash.py). Its causal mask puts the last query
at the last key, as here. Not yet run on a GPU.

Shapes below: n documents with as many new tokens each; heads of size d, in groups that share keys and values.
"""

import functools
import importlib.util
from typing import NamedTuple

import numpy
import torch

from megatron_ext.layers import flash
from megatron_ext.layers.documents import Spans
from megatron_ext.layers.sdpa import attend

PAGED_TORCH, PAGED_FLASH, GATHERED_FLASH = "torch flash, paged", "flash-attn, paged", "torch flash, gathered"
IN_PLACE, GATHERED = "numba, in place", "sdpa, gathered"
_COMPILED = (torch.float32, torch.bfloat16)  # types of a cache that are read in place; numba knows no float16
_FLASH_BLOCK = 256  # both paged kernels: "Paged KV cache block size must be divisible by 256" (flash_api.cpp)


class Step(NamedTuple):
    """What the choice of a kernel depends on, of a step's tokens and the cache they look into."""

    dtype: torch.dtype
    head_size: int
    block_size: int
    tokens: int  # new ones of each document
    target: torch.device


def kernel_name(step: Step) -> str:
    """Return which of the kernels in this file's table computes such a step."""
    if flash.refusal(step.dtype, step.head_size, sequences=1, gpu=flash.capability(step.target)):
        in_place = step.target.type == "cpu" and step.tokens == 1 and step.dtype in _COMPILED
        return IN_PLACE if in_place else GATHERED
    if step.block_size % _FLASH_BLOCK:
        return GATHERED_FLASH
    if flash.has_block_tables():
        return PAGED_TORCH
    return PAGED_FLASH if _has_flash_attn() else GATHERED_FLASH


def gathers(step: Step) -> bool:
    """Return whether such a step copies the blocks of its documents, as many as the longest of them has."""
    return kernel_name(step) in (GATHERED, GATHERED_FLASH)


def kernel_names(step: Step) -> str:
    """Return in words what computes such steps: those that decode a token a document, and those over prompts."""
    decoding, prompts = kernel_name(step._replace(tokens=1)), kernel_name(step._replace(tokens=2))
    return decoding if decoding == prompts else f"{decoding} for decoding; {prompts} for prompts"


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
    each document; `positions` int64 [n, tokens], of the tokens in their documents, one after the other; `sinks` [heads]
    as in `attend`. A token sees its document up to itself, or the last `window` tokens of that.
    """
    kernel = kernel_name(Step(query.dtype, query.size(3), keys.size(1), query.size(1), query.device))
    if kernel == GATHERED:
        k, v = (_gathered(held, table).unflatten(0, (len(table), -1)) for held in (keys, values))
        return attend(query, k, v, scale, window=window, sinks=sinks, positions=positions)
    run = {IN_PLACE: _in_place, PAGED_FLASH: _flash_attn}.get(kernel, _torch_flash)
    return run(query, keys, values, table, positions=positions, scale=scale, window=window, sinks=sinks)


def _gathered(held: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the blocks of each document side by side, [n * most * block size, groups, d]."""
    return held.index_select(0, table.flatten()).flatten(0, 1)


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _torch_flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, *, positions: torch.Tensor,
    scale: float, window: int | None, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return what `attend_blocks` does, by torch's kernel. Nothing here waits for the GPU."""
    documents, tokens = query.shape[:2]
    most = table.size(1) * keys.size(1)  # keys of a document, at most
    used = (positions[:, -1] + 1).int()
    count = torch.arange(documents + 1, device=query.device, dtype=torch.int32)
    over_blocks = {"seqused_k": used}
    if not keys.size(1) % _FLASH_BLOCK and flash.has_block_tables():
        ends = torch.cat([count[:1], used.cumsum(0, dtype=torch.int32)])
        over_blocks["block_table"] = table.int()
    else:
        ends = count * most
        keys, values = (_gathered(held, table) for held in (keys, values))
    asked = flash.Asked(Spans(count * tokens, ends, longest_queries=tokens, longest_keys=most), scale, window)
    out, _ = flash.forward(query.flatten(0, 1), keys, values, asked, sinks, **over_blocks)
    return out.unflatten(0, (documents, tokens))


def _flash_attn(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, *, positions: torch.Tensor,
    scale: float, window: int | None, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return what `attend_blocks` does, by the package flash-attn, which gives log-sums [n, heads, tokens]."""
    from flash_attn import flash_attn_with_kvcache

    out, log_sum = flash_attn_with_kvcache(
        query, keys, values, cache_seqlens=(positions[:, -1] + 1).int(), block_table=table.int(), softmax_scale=scale,
        causal=True, window_size=(-1, -1) if window is None else (window - 1, 0), return_softmax_lse=True,
    )  # fmt: skip
    if sinks is None:
        return out
    flat, _ = flash.with_sinks(out.flatten(0, 1), log_sum.transpose(0, 1).flatten(1), sinks)
    return flat.unflatten(0, out.shape[:2])


def _in_place(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, *, positions: torch.Tensor,
    scale: float, window: int | None, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return what `attend_blocks` does for one token a document on CPU, without a copy of the blocks."""
    from megatron_ext.layers.cpu_kernels import in_place

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
