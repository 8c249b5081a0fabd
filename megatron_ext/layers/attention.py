"""Attention over packed documents (THD), in torch, for mcore's SelfAttention.

A pack is one row of T tokens that holds many documents; a document sees only itself. On a GPU `PackedAttention` runs
torch's FlashAttention over the documents as they lie (flash.py); where that cannot be, it lays documents of a similar
length out as a batch and runs scaled_dot_product_attention (buckets.py, sdpa.py). Tokens of a rollout, which go on from
what a cache holds, are left to that cache (rollout/cache.py). `attention_kernel` says which it is.

A layer may have a sliding window, whose cost is linear in the length, and a sink for each head: a learnable logit in
the softmax's denominator that has no value.

Context parallelism: a rank holds some tokens of each document (`documents.zigzag`). "all_gather" brings the keys and
values of all ranks to each, which then asks for its own queries only; "a2a" (Ulysses, arXiv 2309.14509) exchanges
tokens for heads, so that a rank sees whole documents for its share of the heads.

Letters of shapes: T tokens of a row, c context ranks, h hidden size, d size of a head, s and b tokens and rows of a
batch. "heads" are those of this tensor rank, "kv_heads" its key-value heads.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)

from megatron_ext import cpu_linear
from megatron_ext.device import device
from megatron_ext.layers import flash
from megatron_ext.layers.buckets import Collect, Spread, packed_attention
from megatron_ext.layers.documents import ContextRank, PackedDocuments, PackedRow, packed_documents
from megatron_ext.layers.norm import Norm
from megatron_ext.layers.sdpa import attend, fused_kernel


class _Turn(torch.autograd.Function):
    """Turns by rotary positions: x [T, heads, d] with halves (a, b) -> (a cos - b sin, b cos + a sin). Backward turns
    back. Of heads wider than the halves, the rest stays.
    """

    @staticmethod
    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
        half = cos.size(-1)
        widths = [half, half, x.size(-1) - 2 * half]
        a, b, rest = x.split(widths, dim=-1)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        left, right, kept = out.split(widths, dim=-1)
        torch.mul(a, cos, out=left).addcmul_(b, sin, value=-sign)
        torch.mul(b, cos, out=right).addcmul_(a, sin, value=sign)
        if widths[2]:
            kept.copy_(rest)
        return out

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _Turn.turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Turn.turn(grad, cos, sin, -1), None, None


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x [T, heads, d] turned by the rotary positions of cos and sin [T, 1, half], as `_Turn` says."""
    return _Turn.apply(x, cos, sin) if torch.is_grad_enabled() else _Turn.turn(x, cos, sin, 1)


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


def scale_of(config: TransformerConfig, given: float | None = None) -> float:
    """Return the factor of the scores: `given`, or one over the root of the head size."""
    return given or 1.0 / math.sqrt(config.kv_channels)


def window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """Return how many tokens a token of this layer sees, itself included; None for all before it."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    return config.window_size[0] + 1


def attention_kernel(dtype: torch.dtype, head_size: int, target: torch.device) -> str:
    """Return in words what computes PackedAttention's documents on this device.

    Raises:
        NotImplementedError: it has no kernel for them but one that writes all scores out.
    """
    gpu = flash.capability(target)
    why_not = flash.refusal(dtype, head_size, sequences=1, gpu=gpu)
    if not why_not:
        return "torch's FlashAttention over packed documents"
    if gpu is None:
        return "scaled_dot_product_attention over documents in buckets"
    kernel = fused_kernel(dtype, head_size, masked=True, gpu=gpu).backend.name.lower()
    return f"scaled_dot_product_attention ({kernel}) over documents in buckets, not FlashAttention: {why_not}"


def over_cache(core: Any, row: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the attention [T, heads * d] of a rollout's row (rollout/cache.py) as `core` would compute it."""
    return row.cache.attend(
        row,
        core.layer_number,
        query=query,
        key=key,
        value=value,
        scale=core.scale,
        window=core.window,
        sinks=core.softmax_offset,
    )


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
        self.kernel = attention_kernel(config.params_dtype, config.kv_channels, device())  # in words
        self.layer_number = layer_number
        self.scale = scale_of(config, softmax_scale)
        self.exchanges_heads = cp_comm_type == "a2a"
        self.context_group = pg_collection.cp
        self.window = window_of(config, layer_number)
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
        if getattr(packed_seq_params, "cache", None) is not None:
            return over_cache(self, packed_seq_params, query=query, key=key, value=value)
        if isinstance(packed_seq_params, PackedDocuments):
            documents = packed_seq_params
        else:
            context = ContextRank(group.size(), group.rank())
            documents = packed_documents(packed_seq_params.cu_seqlens_q.cpu().numpy(), query.device, context)
        if self.exchanges_heads and group.size() > 1:
            query, key, value = (tokens_for_heads(x, group) for x in (query, key, value))
            sinks = None if sinks is None else sinks.chunk(group.size())[group.rank()]
        elif group.size() > 1:
            key, value = (gather_from_sequence_parallel_region(x, group=group) for x in (key, value))
        sequences = len(documents.cu_seqlens) - 1
        way = self._by_flash if flash.usable(query, 2 * sequences) else self._in_buckets
        out = way(documents, query, key, value, sinks=sinks)
        return heads_for_tokens(out, group) if self.exchanges_heads and group.size() > 1 else out

    @property
    def _shares_queries(self) -> bool:
        """Whether this rank asks for its own tokens, with the keys of all context ranks."""
        return self.context_group.size() > 1 and not self.exchanges_heads

    def _in_buckets(
        self, documents: PackedDocuments, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend in batches: keys and values [T, kv_heads, d], tokens rank after rank -> [queries, heads * d]."""
        return packed_attention(
            q,
            k,
            v,
            documents.layout,
            scale=self.scale,
            window=self.window,
            sinks=sinks,
            share=documents.share if self._shares_queries else None,
        )

    def _by_flash(
        self, documents: PackedDocuments, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend by torch's FlashAttention: as `_in_buckets`."""
        if self._shares_queries:
            spans, picked = documents.chunk_spans(self.window)
            k, v = (x.index_select(0, picked) for x in (k, v))
            return flash.attention(q, k, v, flash.Asked(spans, self.scale, self.window), sinks).flatten(1)
        asked, turned = flash.Asked(documents.spans, self.scale, self.window), self.context_group.size() > 1
        if turned:  # from rank after rank to the order of the documents, and back
            q, k, v = (Spread.apply(x, documents.order, x.size(0)) for x in (q, k, v))
        out = flash.attention(q, k, v, asked, sinks).flatten(1)
        return Collect.apply(out, documents.order) if turned else out

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
    """Gives mcore's SelfAttention a shorter way through a packed row, and a way through a rollout's.

    mcore turns the queries and keys of every layer document by document (rope_utils.py:178). Here the cosines and
    sines of a row are computed once and serve all layers. Same parameters, same function; whatever is not a plain
    packed row (inference contexts, recomputation of the core, interleaved rotation) takes mcore's way. So does training
    with Transformer Engine's fused rotation, which is as short. Layers without positions (no_rope_freq) turn nothing.

    The tokens of a rollout (`row.cache`) stand anywhere in their documents, which mcore's way does not know: they are
    turned here, or refused.
    """

    own_rotary: Any  # mcore's RotaryEmbedding of a layer whose positions are not the model's; most have none

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **others: Any) -> Any:
        """Return (output [T / c, 1, h], bias) of hidden_states [T / c, 1, h]."""
        row, angles = others.get("packed_seq_params"), others.get("rotary_pos_emb")
        own = getattr(self, "own_rotary", None)
        if own is not None and angles is not None:
            angles = others["rotary_pos_emb"] = own(angles.size(0), packed_seq=row is not None)
        if not isinstance(row, PackedRow) or angles is None:
            return super().forward(hidden_states, attention_mask, **others)
        plain = (
            isinstance(angles, torch.Tensor)
            and others.get("inference_context") is None
            and not self.config.rotary_interleaved
            and not self.config.attention_output_gate
        )
        if row.cache is None and (not plain or self.checkpoint_core_attention or self.config.apply_rope_fusion):
            return super().forward(hidden_states, attention_mask, **others)
        if not plain:
            raise NotImplementedError("a rollout knows only rotations by halves, without output gates")
        turns = None
        if not self.config.no_rope_freq or not self.config.no_rope_freq[self.layer_number - 1]:
            factor = _yarn_get_concentration_factor_from_config(self.config)
            turns = row.turns(angles, hidden_states.dtype, factor, own=own is not None)
        query, key, value = self._turned_heads(hidden_states, turns)
        out = self.core_attention(query, key, value, attention_mask, packed_seq_params=row)
        return self.linear_proj(out.unsqueeze(1))

    def _turned_heads(
        self, hidden_states: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor] | None
    ) -> Sequence[torch.Tensor]:
        """Return query [T / c, heads, d], key and value [T / c, groups, d], turned by cosine and sine if there are."""
        norms = self._norms_of_heads() if turns and cpu_linear.in_rollout(hidden_states) else None
        if turns and norms:
            from megatron_ext.layers import cpu_kernels  # which imports a compiler

            mixed, _ = self.get_query_key_value_tensors(hidden_states, split_qkv=False)
            mixed = mixed.squeeze(1).unflatten(2, (-1, self.hidden_size_per_attention_head))
            return cpu_kernels.heads(mixed, *turns, norms=norms)
        parts = self.get_query_key_value_tensors(hidden_states)  # [T / c, 1, heads | groups, d]
        query, key, value = (x.squeeze(1) for x in parts)
        return (turned(query, *turns), turned(key, *turns), value) if turns else (query, key, value)

    def _norms_of_heads(self) -> list[tuple[torch.Tensor | None, float]] | None:
        """Return weight and epsilon of the norms of queries and keys, as `cpu_kernels.heads` takes them.

        None where a head's norm is another than its own RMSNorm or has hooks, or a rank has a part of a group of heads.
        """
        if self.config.num_query_groups is None or self.config.num_query_groups < self.world_size:
            return None
        norms: list[tuple[torch.Tensor | None, float]] = []
        for norm in (self.q_layernorm, self.k_layernorm):
            if norm is not None and cpu_linear.is_heard(norm):
                return None
            if norm is None or isinstance(norm, IdentityOp):
                norms.append((None, 0.0))
            elif type(norm) is Norm and norm.bias is None and not norm.zero_centered:
                norms.append((norm.weight, norm.eps))
            else:
                return None
        return norms
