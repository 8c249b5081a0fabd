"""The documents of a packed row (THD): where each begins, which of its tokens a context rank holds, and how they are
sorted into buckets for a kernel that takes batches; or which keys the queries of each see, for one that does not.

A pack is one row of T tokens that holds many documents; a document sees only itself. `DocumentLayout` sorts the
documents of a pack by length into buckets, once for all layers, without a loop over documents. `zigzag` says which
tokens of a row a context rank holds.

Letters of shapes: T tokens of a row, c context ranks (each holds T / c tokens), h hidden size, d size of a head.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import torch
from megatron.core.packed_seq_params import PackedSeqParams

SHORTEST_BUCKET = 16  # tokens; below it the launch costs more than the padding
LONG = 128  # tokens; above it padding costs more than launches, and buckets are finer


class ContextRank(NamedTuple):
    """Number of one of `size` ranks that share a row of tokens."""

    size: int = 1
    rank: int = 0


ALONE = ContextRank()


def zigzag(cu_seqlens: numpy.ndarray, context: ContextRank) -> numpy.ndarray:
    """Return the tokens of a pack that a context rank holds, int64 [T / size], in the order in which it holds them.

    Each document is cut into 2 * size equal chunks, and rank r holds chunks r and 2 * size - 1 - r of it, so that all
    ranks have the same causal work (Transformer Engine's thd_get_partitioned_indices).

    Raises:
        ValueError: a document does not divide; packs are made with `align` a multiple of 2 * size.
    """
    if context.size == 1:
        return numpy.arange(int(cu_seqlens[-1]))
    return ranges(*chunks(cu_seqlens, context))


def chunks(cu_seqlens: numpy.ndarray, context: ContextRank) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return where the two chunks of each document begin that a context rank holds (`zigzag`), and their lengths.

    Both are int64 [2 * documents].

    Raises:
        ValueError: a document does not divide.
    """
    size, rank = context
    lengths = numpy.diff(cu_seqlens).astype(numpy.int64)
    if (lengths % (2 * size)).any():
        odd = int(lengths[lengths % (2 * size) > 0][0])
        raise ValueError(f"a document of {odd} tokens does not divide into the {2 * size} chunks of {size} ranks")
    chunk = lengths // (2 * size)
    first, second = cu_seqlens[:-1] + rank * chunk, cu_seqlens[:-1] + (2 * size - 1 - rank) * chunk
    return numpy.stack([first, second], axis=1).ravel(), numpy.repeat(chunk, 2)


def rank_after_rank(cu_seqlens: numpy.ndarray, context_size: int) -> numpy.ndarray:
    """Return the tokens of a pack in the order in which they come from the context ranks, int64 [T]."""
    return numpy.concatenate([zigzag(cu_seqlens, ContextRank(context_size, rank)) for rank in range(context_size)])


def ranges(starts: numpy.ndarray, lengths: numpy.ndarray) -> numpy.ndarray:
    """Return the numbers starts[i], starts[i] + 1, ... of each range of lengths[i], one range after the other."""
    return numpy.arange(lengths.sum()) - numpy.repeat(numpy.cumsum(lengths) - lengths - starts, lengths)


class Bucket(NamedTuple):
    """Documents of a similar length: slots [start, start + documents * length) of a padded buffer."""

    start: int
    documents: int
    length: int

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return the bucket's part of a buffer [rows, ...] as [documents, length, ...]."""
        return buffer.narrow(0, self.start, self.documents * self.length).unflatten(0, (self.documents, self.length))


@dataclass(frozen=True)
class DocumentLayout:
    """Where each token of a pack lies in the padded buffer that the buckets share.

    `slots` is int64 [T]: token t goes to row slots[t] of a buffer with `rows` rows. Tokens are counted in the order
    in which they come from the context ranks, one rank after the other.
    """

    buckets: tuple[Bucket, ...]
    slots: torch.Tensor
    rows: int

    @staticmethod
    def of(cu_seqlens: numpy.ndarray, target: torch.device, context_size: int = 1) -> "DocumentLayout":
        """Lay out documents that end at `cu_seqlens` (int [documents + 1], first 0). Empty documents are fine."""
        lengths = numpy.diff(cu_seqlens).astype(numpy.int64)
        padded = _padded(lengths)
        buckets, starts, rows = _fill(lengths, padded)
        slots = ranges(starts, lengths)[rank_after_rank(cu_seqlens, context_size)]
        return DocumentLayout(buckets, torch.from_numpy(slots).to(target), rows)

    @staticmethod
    def of_share(cu_seqlens: numpy.ndarray, target: torch.device, context_size: int) -> "DocumentLayout":
        """Lay out one context rank's tokens [T / size]: bucket for bucket that of `of`, 1 / size as long."""
        lengths = numpy.diff(cu_seqlens).astype(numpy.int64)
        buckets, starts, rows = _fill(lengths, _padded(lengths), context_size)
        return DocumentLayout(buckets, torch.from_numpy(ranges(starts, lengths // context_size)).to(target), rows)


def _padded(lengths: numpy.ndarray) -> numpy.ndarray:
    """Return the bucket length of each document: the next power of two, or of its sixteenths for long ones."""
    power = 1 << numpy.ceil(numpy.log2(numpy.maximum(lengths, SHORTEST_BUCKET))).astype(numpy.int64)  # exact below 2^48
    unit = numpy.where(lengths > LONG, power // 16, power)
    return -(-numpy.maximum(lengths, 1) // unit) * unit


def _fill(
    lengths: numpy.ndarray, padded: numpy.ndarray, context_size: int = 1
) -> tuple[tuple[Bucket, ...], numpy.ndarray, int]:
    """Return the buckets, the first row of each document and the number of rows, where 1 / context_size of each is laid
    out.
    """
    order = numpy.argsort(padded, kind="stable")
    order = order[lengths[order] > 0]
    share = padded[order] // context_size
    starts = numpy.zeros(len(lengths), numpy.int64)
    starts[order] = numpy.cumsum(share) - share
    sizes, counts = numpy.unique(padded[order], return_counts=True)
    buckets, start = [], 0
    for size, count in zip((sizes // context_size).tolist(), counts.tolist()):
        buckets.append(Bucket(start, count, size))
        start += size * count
    return tuple(buckets), starts, start


@dataclass(frozen=True)
class ContextShare:
    """The queries of one context rank, where it has the keys of all: their layout, and each row's position in its
    document, int64 [rows] (0 in rows of no token)."""

    layout: DocumentLayout
    positions: torch.Tensor


class Spans(NamedTuple):
    """Which queries of a row see which keys of another, as a kernel for sequences of many lengths takes it.

    Sequence i has the queries [queries[i], queries[i + 1]) and the keys [keys[i], keys[i + 1]), both int32 [n + 1] on
    the device; its last query stands at its last key. The longest of either, or more, are numbers of the host.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest_queries: int
    longest_keys: int


class ChunkSpans(NamedTuple):
    """The spans of one context rank's chunks, each with the part of its document that it sees as its keys.

    `picked` int64 [keys], which of the gathered keys (tokens rank after rank) these are, in order.
    """

    spans: Spans
    picked: torch.Tensor

    @staticmethod
    def of(
        cu_seqlens: numpy.ndarray, target: torch.device, context: ContextRank, window: int | None = None
    ) -> "ChunkSpans":
        """Cut documents that end at `cu_seqlens`; with a window, keys that no query of a chunk sees are left out."""
        starts, lengths = chunks(cu_seqlens, context)
        seen_from = numpy.repeat(cu_seqlens[:-1], 2).astype(numpy.int64)
        if window is not None:
            seen_from = numpy.maximum(seen_from, starts - window + 1)
        seen = numpy.where(lengths > 0, starts + lengths - seen_from, 0)
        place = numpy.argsort(rank_after_rank(cu_seqlens, context.size))  # of the row's tokens among the gathered
        queries, keys = (
            torch.from_numpy(numpy.concatenate([[0], numpy.cumsum(part)]).astype(numpy.int32)).to(target)
            for part in (lengths, seen)
        )
        spans = Spans(queries, keys, int(lengths.max()), int(seen.max()))
        return ChunkSpans(spans, torch.from_numpy(place[ranges(seen_from, seen)]).to(target))


@dataclass(kw_only=True)
class PackedRow(PackedSeqParams):
    """mcore's THD parameters, and where the row's tokens stand in their documents.

    A rank holds T / c of the row's T tokens, at `positions` int64 [T / c] of their documents.
    """

    total_tokens: int  # T
    positions: torch.Tensor = field(repr=False)
    cache: Any = field(default=None, repr=False)  # rollout/cache.py: what earlier tokens of the documents left
    _turns: dict[bool, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    def turns(
        self, angles: torch.Tensor, dtype: torch.dtype, length: float = 1.0, own: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine [T / c, 1, d / 2] of each token's position, times `length` (YaRN's attention factor).

        `angles` is mcore's table [longest, 1, 1, d]: the model's, or the `own` one of some layers.
        """
        if own not in self._turns:
            half = angles.size(-1) // 2  # the table repeats its first half
            here = angles[:, 0, :, :half].index_select(0, self.positions)  # [T / c, 1, d / 2]
            # With the table, which a recorded pass (rollout/graphs.py) reads again.
            self._turns[own] = (here.cos() * length).to(dtype), (here.sin() * length).to(dtype), angles
        return self._turns[own][:2]


@dataclass(kw_only=True)
class PackedDocuments(PackedRow):
    """The row of a training step: what the torch layers need of its documents, made once for all layers.

    The tokens that a rank holds are `held` int64 [T / c] (numpy, indices into the row). All ranks' tokens, rank after
    rank, are the row's tokens `order` int64 [T].
    """

    held: numpy.ndarray = field(repr=False)
    order: torch.Tensor = field(repr=False)
    layout: DocumentLayout = field(repr=False)
    share: ContextShare | None = field(default=None, repr=False)  # with context parallelism only
    cu_seqlens: numpy.ndarray = field(repr=False)  # int [documents + 1]
    context: ContextRank = ALONE
    _chunk_spans: dict[int | None, ChunkSpans] = field(default_factory=dict, repr=False)

    @property
    def spans(self) -> Spans:
        """The row's documents, each of which sees itself."""
        return Spans(self.cu_seqlens_q, self.cu_seqlens_q, self.max_seqlen_q, self.max_seqlen_q)

    def chunk_spans(self, window: int | None) -> ChunkSpans:
        """Return the spans of this context rank's chunks, made once for all layers with this window."""
        if window not in self._chunk_spans:
            made = ChunkSpans.of(self.cu_seqlens, self.positions.device, self.context, window)
            self._chunk_spans[window] = made
        return self._chunk_spans[window]


def packed_documents(cu_seqlens: numpy.ndarray, target: torch.device, context: ContextRank = ALONE) -> PackedDocuments:
    """Return the THD parameters of a pack whose documents end at `cu_seqlens` (int [documents + 1], first 0, last T).

    `max_seqlen` is the longest document, not T: mcore's rotary embedding takes T as "positions run on over documents"
    (rope_utils.py:211). Where one document is the whole pack the two agree. A document's padding belongs to it, so
    that the padded boundaries, by which Transformer Engine splits a row over context ranks, are the boundaries.
    """
    cu = torch.from_numpy(numpy.ascontiguousarray(cu_seqlens, numpy.int32)).to(target)
    longest = int(numpy.diff(cu_seqlens).max())
    held = zigzag(cu_seqlens, context)
    starts = numpy.repeat(cu_seqlens[:-1], numpy.diff(cu_seqlens))  # [T]
    positions = torch.from_numpy((held - starts[held]).astype(numpy.int64)).to(target)
    share = None
    if context.size > 1:
        layout = DocumentLayout.of_share(cu_seqlens, target, context.size)
        share = ContextShare(layout, positions.new_zeros(layout.rows).index_copy_(0, layout.slots, positions))
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=cu,
        cu_seqlens_kv=cu,
        cu_seqlens_q_padded=cu,
        cu_seqlens_kv_padded=cu,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        total_tokens=int(cu_seqlens[-1]),
        held=held,
        positions=positions,
        order=torch.from_numpy(rank_after_rank(cu_seqlens, context.size)).to(target),
        layout=DocumentLayout.of(cu_seqlens, target, context.size),
        share=share,
        cu_seqlens=cu_seqlens,
        context=context,
    )
