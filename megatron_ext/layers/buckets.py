"""Attention of a packed row's documents in batches: what serves where torch's FlashAttention (flash.py) cannot.

Each bucket of documents of a similar length (documents.py) is laid out as a batch [documents, length], and one causal
attention (sdpa.py) runs on it: no [T, T] mask, and the cost is that of sum(length^2), at most 1.3 times it (four times
for documents that are shorter than 128 tokens, which cost little).

Isolation is exact: a document's row of the batch holds nothing but its own tokens and, after them, zeros that the
causal order hides. Other documents can neither reach its output nor its gradient.
"""

from typing import Any

import torch

from megatron_ext.layers.documents import ContextShare, DocumentLayout
from megatron_ext.layers.sdpa import attend


class Spread(torch.autograd.Function):
    """Puts x [T, ...] into [rows, ...]: token t in row slots[t], zeros elsewhere. Backward reads the rows back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slots: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(slots)
        return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, slots, x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Collect(torch.autograd.Function):
    """Undoes `Spread`: [rows, ...] -> [T, ...]. Backward gives zeros to the rows of no token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slots)
        ctx.rows = x.size(0)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.new_zeros((ctx.rows, *grad.shape[1:])).index_copy_(0, ctx.saved_tensors[0], grad), None


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: DocumentLayout,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    share: ContextShare | None = None,
) -> torch.Tensor:
    """Let each document of a row attend to itself: q [T, heads, d], k and v [T, kv_heads, d] -> [T, heads * d].

    With `share`, q holds the tokens of one context rank, [T / c, heads, d] -> [T / c, heads * d].
    """
    asking = layout if share is None else share.layout
    q = Spread.apply(q, asking.slots, asking.rows)
    k, v = (Spread.apply(x, layout.slots, layout.rows) for x in (k, v))  # [rows, heads, d]
    outs = []
    for queries, keys in zip(asking.buckets, layout.buckets):
        positions = None if share is None else queries.of(share.positions)
        out = attend(
            queries.of(q), keys.of(k), keys.of(v), scale=scale, window=window, sinks=sinks, positions=positions
        )
        outs.append(out.reshape(queries.documents * queries.length, -1))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return Collect.apply(out, asking.slots)
