"""Attention over packed documents (THD), in torch, for mcore's SelfAttention.

A pack is one row of T tokens that holds many documents; a document sees only itself. `PackedAttention` lays each
bucket of documents of a similar length (documents.py) out as a batch [documents, length] and runs one causal
scaled_dot_product_attention on it: no [T, T] mask, and the cost is that of sum(length^2), at most 1.3 times it (four
times for documents that are shorter than 128 tokens, which cost little).

A layer may have a sliding window, whose cost is linear in the length, and a sink for each head: a learnable logit in
the softmax's denominator that has no value (`attend`).

Isolation is exact: a document's row of the batch holds nothing but its own tokens and, after them, zeros that the
causal order hides. Other documents can neither reach its output nor its gradient.

Context parallelism: a rank holds some tokens of each document (`documents.zigzag`). "all_gather" brings the keys and
values of all ranks to each, which then asks for its own queries only; "a2a" (Ulysses, arXiv 2309.14509) exchanges
tokens for heads, so that a rank sees whole documents for its share of the heads.

Letters of shapes: T tokens of a row, c context ranks, h hidden size, d size of a head, s and b tokens and rows of a
batch. "heads" are those of this tensor rank, "kv_heads" its key-value heads.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)

from megatron_ext.device import device
from megatron_ext.layers.documents import (
    ContextRank,
    ContextShare,
    DocumentLayout,
    PackedDocuments,
    PackedRow,
    packed_documents,
)

SINK_COLUMNS = 8  # added to the head size; 1 would do, but GPU kernels want head sizes in eights
QUERY_BLOCK = 512  # queries at once against a longer cache of keys: bounds the mask


class _Spread(torch.autograd.Function):
    """Puts x [T, ...] into [rows, ...]: token t in row slots[t], zeros elsewhere. Backward reads the rows back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slots: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(slots)
        return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, slots, x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """Undoes `_Spread`: [rows, ...] -> [T, ...]. Backward gives zeros to the rows of no token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slots)
        ctx.rows = x.size(0)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.new_zeros((ctx.rows, *grad.shape[1:])).index_copy_(0, ctx.saved_tensors[0], grad), None


class _Turn(torch.autograd.Function):
    """Turns by rotary positions: x [T, heads, d] with halves (a, b) -> (a cos - b sin, b cos + a sin). Backward turns
    back.
    """

    @staticmethod
    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        left, right = out.chunk(2, dim=-1)
        torch.mul(a, cos, out=left).addcmul_(b, sin, value=-sign)
        torch.mul(b, cos, out=right).addcmul_(a, sin, value=sign)
        return out

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _Turn.turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Turn.turn(grad, cos, sin, -1), None, None


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Run torch's kernel on [batch, tokens, heads, d]; causal where no mask is given: [(batch, 1,) queries, keys]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.size(1) != k.size(1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)


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
    q = _Spread.apply(q, asking.slots, asking.rows)
    k, v = (_Spread.apply(x, layout.slots, layout.rows) for x in (k, v))  # [rows, heads, d]
    outs = []
    for queries, keys in zip(asking.buckets, layout.buckets):
        positions = None if share is None else queries.of(share.positions)
        out = attend(
            queries.of(q), keys.of(k), keys.of(v), scale=scale, window=window, sinks=sinks, positions=positions
        )
        outs.append(out.reshape(queries.documents * queries.length, -1))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return _Collect.apply(out, asking.slots)


def tokens_for_heads(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Exchange tokens for heads: [T / c, heads, d] -> [T, heads / c, d], this rank's heads, tokens rank after rank.

    Fewer KV heads than ranks, or a number that does not divide, are repeated until they do.
    """
    x = x.repeat_interleave(math.lcm(x.size(1), group.size()) // x.size(1), dim=1)
    tokens, heads, d = x.shape
    by_rank = x.view(tokens, group.size(), heads // group.size(), d).transpose(0, 1)
    return all_to_all(group, by_rank.reshape(-1, heads // group.size(), d))


def heads_for_tokens(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Undo `tokens_for_heads`, with the heads side by side: [T, width / c] -> [T / c, width]."""
    by_rank = all_to_all(group, x).view(group.size(), -1, x.size(1))
    return by_rank.transpose(0, 1).reshape(by_rank.size(1), -1)


class PackedAttention(MegatronModule):
    """Serves as `core_attention` of a SelfAttention spec: packed rows (THD), or a batch of full sequences (SBHD),
    causal.

    mcore's own DotProductAttention refuses packed sequences (dot_product_attention.py:153).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ):
        super().__init__(config=config)
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise NotImplementedError(f"PackedAttention is causal; this layer asks for {attn_mask_type.name}")
        window = config.window_size or (0, 0)
        for name, unsupported in {
            "window_size": window[0] < 0 or window[1] != 0,
            "softmax_type": config.softmax_type not in ("vanilla", "learnable"),
            "attention_dropout": bool(attention_dropout or config.attention_dropout),
        }.items():
            if unsupported:
                raise NotImplementedError(f"PackedAttention has no {name} = {getattr(config, name)} yet")
        self.layer_number = layer_number
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.exchanges_heads = cp_comm_type == "a2a"
        self.context_group = pg_collection.cp
        self.window = None  # tokens that a token sees, itself included
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = window[0] + 1
        self.softmax_offset = None  # the sinks of this tensor rank's heads, by mcore's name
        if config.softmax_type == "learnable":
            self.tensor_group = pg_collection.tp
            heads = config.num_attention_heads // self.tensor_group.size()
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype, device=device()))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend: packed, [T / c, heads, d] -> [T / c, heads * d]; otherwise [s, b, heads, d] -> [s, b, heads * d]."""
        if attention_mask is not None or attention_bias is not None:
            raise NotImplementedError("PackedAttention knows only the causal mask of each document")
        group, sinks = self.context_group, self.softmax_offset
        if packed_seq_params is None:
            if group.size() > 1:
                raise NotImplementedError("PackedAttention splits only packed rows over context ranks")
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
            out = attend(query, key, value, scale=self.scale, window=self.window, sinks=sinks)
            return out.flatten(2).transpose(0, 1)
        cache = getattr(packed_seq_params, "cache", None)
        if cache is not None:
            return cache.attend(
                packed_seq_params,
                self.layer_number,
                query=query,
                key=key,
                value=value,
                scale=self.scale,
                window=self.window,
                sinks=sinks,
            )
        if isinstance(packed_seq_params, PackedDocuments):
            documents = packed_seq_params
        else:
            context = ContextRank(group.size(), group.rank())
            documents = packed_documents(packed_seq_params.cu_seqlens_q.cpu().numpy(), query.device, context)
        share = None
        if self.exchanges_heads and group.size() > 1:
            query, key, value = (tokens_for_heads(x, group) for x in (query, key, value))
            sinks = None if sinks is None else sinks.chunk(group.size())[group.rank()]
        elif group.size() > 1:
            key, value = (gather_from_sequence_parallel_region(x, group=group) for x in (key, value))
            share = documents.share
        out = packed_attention(
            query, key, value, documents.layout, scale=self.scale, window=self.window, sinks=sinks, share=share
        )
        return heads_for_tokens(out, group) if self.exchanges_heads and group.size() > 1 else out

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the sinks, cut over tensor ranks, by the key that mcore's and Transformer Engine's attention give
        them.
        """
        if self.softmax_offset is None:
            return {}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tensor_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class PackedSelfAttention(SelfAttention):
    """Gives mcore's SelfAttention a shorter way through a packed row.

    mcore turns the queries and keys of every layer document by document (rope_utils.py:178). Here the cosines and
    sines of a row are computed once and serve all layers. Same parameters, same function; whatever is not a plain
    packed row (inference contexts, recomputation of the core, partial or interleaved rotation) takes mcore's way.
    """

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **others: Any) -> Any:
        """Return (output [T / c, 1, h], bias) of hidden_states [T / c, 1, h]."""
        documents, angles = others.get("packed_seq_params"), others.get("rotary_pos_emb")
        if not isinstance(documents, PackedRow) or not isinstance(angles, torch.Tensor):
            return super().forward(hidden_states, attention_mask, **others)
        plain = (
            angles.size(-1) == self.hidden_size_per_attention_head
            and others.get("inference_context") is None
            and not self.checkpoint_core_attention
            and not self.config.rotary_interleaved
            and not self.config.attention_output_gate
        )
        if not plain:
            return super().forward(hidden_states, attention_mask, **others)
        query, key, value = self.get_query_key_value_tensors(hidden_states)  # [T / c, 1, heads | groups, d]
        cos, sin = documents.turns(angles, query.dtype, _yarn_get_concentration_factor_from_config(self.config))
        query, key = _Turn.apply(query.squeeze(1), cos, sin), _Turn.apply(key.squeeze(1), cos, sin)
        out = self.core_attention(query, key, value.squeeze(1), attention_mask, packed_seq_params=documents)
        return self.linear_proj(out.unsqueeze(1))
