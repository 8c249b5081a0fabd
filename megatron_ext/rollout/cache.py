"""What earlier tokens left: keys and values in blocks, recurrent states in slots; and a step's tokens over them.

This is the seam between kernels: on CPU the blocks of samples of similar length are gathered into a batch for torch's
kernels.

Shapes below: T tokens of a step's row, n documents computed together, heads of size d (p in Mamba), in groups that
share keys and values.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy
import torch
from megatron.core.transformer import TransformerConfig

from megatron_ext.device import send
from megatron_ext.layers.documents import PackedRow
from megatron_ext.layers.mamba import MambaMixer
from megatron_ext.layers.mamba_scan import State
from megatron_ext.rollout.kernels import Step, attend_blocks, gathers
from megatron_ext.rollout.room import block_bytes, blocks_in

_ANGLES = 1024  # positions; rotary tables are made for multiples, so that they are made seldom


class NewTokens(NamedTuple):
    """Tokens from `start` on of a document, as one step computes them, and the blocks and the slot of that document.

    Without a slot its recurrent state goes to the one that is nobody's.
    """

    tokens: tuple[int, ...]
    start: int
    blocks: list[int]
    slot: int | None = None

    @property
    def stop(self) -> int:
        """The position after the last of these tokens."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class CachedBatch:
    """Documents that are computed together: `tokens` of each of n, wherever they are in the step's row.

    `rows` int64 [n * tokens], their places in the row; `positions` int64 [n, tokens] in their documents; `table` int64
    [n, blocks], their blocks, filled up with any; `slots` int64 [n]; `fresh` bool [n], those at their first token;
    `whole` says that these are all tokens of the row, in its order.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    table: torch.Tensor
    slots: torch.Tensor
    fresh: torch.Tensor
    whole: bool = False

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """Return the batch's part [n, tokens, ...] of a column [T, ...] of the row."""
        return (x if self.whole else x.index_select(0, self.rows)).unflatten(0, self.positions.shape)


class Cache:
    """What each of this rank's layers that looks back needs of earlier tokens.

    Attention: keys and values [blocks, block size, groups, d]. Mamba: the state after the last token, [slots, ...].
    The memory is there from `allocate` to `free`: between rollouts training has it. The last block and the last slot
    are nobody's: tokens that only fill a row up, or make a pass for other ranks' sake, write there.
    """

    def __init__(self, model: torch.nn.Module, config: TransformerConfig, block_size: int, target: torch.device):
        self.attention, self.mixers = _looking_back(model)
        groups = max(1, (config.num_query_groups or 1) // config.tensor_model_parallel_size)
        self.block_size, self.target = block_size, target
        self.shape, self.dtype = (groups, config.kv_channels), config.params_dtype
        self.gathers = gathers(Step(self.dtype, config.kv_channels, block_size, tokens=1, target=target))
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.states: dict[int, State] = {}
        self.spare_slot = 0

    def blocks_in(self, gib: float) -> int:
        """Return how many blocks so much memory holds, besides the one that is nobody's."""
        size = torch.empty(0, dtype=self.dtype).element_size()
        return blocks_in(gib, block_bytes(len(self.attention), self.block_size, *self.shape, size))

    def allocate(self, blocks: int, slots: int) -> None:
        """Take the memory of so many blocks and slots.

        It holds zeros, not whatever lies there: a block's unused places are multiplied by 0, and NaN times 0 is NaN.
        """
        shape = (blocks + 1, self.block_size, *self.shape)
        for layer in self.attention:
            self.keys[layer] = _zeros(shape, self.dtype, self.target)
            self.values[layer] = _zeros(shape, self.dtype, self.target)
        self.spare_slot = slots
        for layer, mixer in self.mixers.items():
            empty = mixer.empty_state(torch.empty(slots + 1, 0, dtype=self.dtype, device=self.target))
            self.states[layer] = empty

    def free(self) -> None:
        """Give the memory back."""
        for held in (self.keys, self.values, self.states):
            held.clear()

    @property
    def spare(self) -> int:
        """A place of the block that is nobody's."""
        return next(iter(self.keys.values())).size(0) * self.block_size - 1 if self.keys else 0

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to), in order: a block may be written to after it was read from."""
        for source, target in pairs:
            for held in (*self.keys.values(), *self.values.values()):
                held[target] = held[source]

    def copy_states(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy recurrent states (from, to), in order."""
        for source, target in pairs:
            for state in self.states.values():
                for held in state:
                    held[target] = held[source]

    def attend(
        self,
        row: "CachedRow",
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the attention [T, heads * d] of a step's tokens: query [T, heads, d], key and value [T, groups, d].

        The new keys and values are written to their places; each token sees its document up to itself.
        """
        keys, values = self.keys[layer], self.values[layer]
        keys.flatten(0, 1).index_copy_(0, row.places, key)
        values.flatten(0, 1).index_copy_(0, row.places, value)
        outs = []
        for batch in row.batches:
            attended = attend_blocks(
                batch.pick(query),
                keys,
                values,
                batch.table,
                positions=batch.positions,
                scale=scale,
                window=window,
                sinks=sinks,
            )
            outs.append(attended.reshape(len(batch.rows), -1))
        return row.spread(outs)

    def recur(self, row: "CachedRow", mixer: MambaMixer, projected: torch.Tensor) -> torch.Tensor:
        """Return y [T, 1, heads * p] for `projected` [T, 1, width] of a step's tokens.

        The states of their documents go on.
        """
        held = self.states[_number(mixer)]
        outs = []
        for batch in row.batches:
            state = State(*(part.index_select(0, batch.slots) for part in held))
            state.documents[batch.fresh] = -1
            state.ssm[batch.fresh] = 0
            y, state = mixer.advance(batch.pick(projected.squeeze(1)), torch.zeros_like(batch.positions), state)
            for part, new in zip(held, state):
                part.index_copy_(0, batch.slots, new.to(part.dtype))
            outs.append(y.flatten(0, 1))
        return row.spread(outs).unsqueeze(1)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, target: torch.device) -> torch.Tensor:
    """Return a tensor of zeros. On CPU they are the system's own, whose pages take no memory until they are used."""
    if target.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=target)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _looking_back(model: torch.nn.Module) -> tuple[list[int], dict[int, MambaMixer]]:
    """Return the numbers of the attention layers, and the Mamba mixers by number."""
    from megatron.core.transformer.attention import SelfAttention

    attention = [module.layer_number for module in model.modules() if isinstance(module, SelfAttention)]
    return attention, {_number(module): module for module in model.modules() if isinstance(module, MambaMixer)}


def _number(mixer: MambaMixer) -> int:
    """Return the number of a layer in its model, from 1."""
    assert mixer.layer_number is not None  # a decoder numbers its layers
    return mixer.layer_number


@dataclass
class CachedRow(PackedRow):
    """The tokens of one step as a packed row of T tokens: documents that go on from what the cache holds of them.

    `places` int64 [T], where each token's keys and values go: block * block size + offset.
    """

    positions: torch.Tensor = field(kw_only=True, repr=False)
    places: torch.Tensor = field(kw_only=True, repr=False)
    batches: tuple[CachedBatch, ...] = ()

    def spread(self, outs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the column [T, width] of what each batch gives for its tokens, [n * tokens, width]; others are 0."""
        if self.batches[0].whole:
            return outs[0]
        column = outs[0].new_zeros(self.total_tokens, outs[0].size(-1))
        for batch, out in zip(self.batches, outs):
            column.index_copy_(0, batch.rows, out)
        return column


def on_device(arrays: Sequence[numpy.ndarray]) -> list[torch.Tensor]:
    """Return arrays of integers on the device as int64, by one copy."""
    flat = numpy.concatenate([array.ravel() for array in arrays]).astype(numpy.int64, copy=False)
    parts = send(torch.from_numpy(flat)).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays)]


def cached_row(documents: Sequence[NewTokens], cache: Cache, filler: int = 0, width: int = 0) -> CachedRow:
    """Return the row of `documents`, one after the other, and after them `filler` tokens of no document.

    Documents of one new token are a batch; where its kernel would gather their blocks, those whose blocks the same
    power of two holds are one. With `width` each has so many blocks, and their row differs from another's in numbers
    only. A longer document is alone.
    """
    size = cache.block_size
    spans = [numpy.arange(document.start, document.stop) for document in documents]
    tables = [numpy.array(document.blocks[: -(-document.stop // size)], numpy.int64) for document in documents]
    places = [table[span // size] * size + span % size for span, table in zip(spans, tables)]
    starts = numpy.cumsum([0] + [len(span) for span in spans])
    kinds: dict[tuple[int, int], list[int]] = {}
    for number, (span, table) in enumerate(zip(spans, tables)):
        length = (len(table) - 1).bit_length() if not width and cache.gathers else 0
        kinds.setdefault((0, length) if len(span) == 1 else (1, number), []).append(number)

    def batch(numbers: list[int]) -> list[numpy.ndarray]:
        """Return the fields of a CachedBatch."""
        table = numpy.zeros((len(numbers), width or max(len(tables[i]) for i in numbers)), numpy.int64)
        for held, i in zip(table, numbers):
            held[: len(tables[i])] = tables[i]
        return [
            numpy.concatenate([numpy.arange(starts[i], starts[i + 1]) for i in numbers]),
            numpy.stack([spans[i] for i in numbers]),
            table,
            numpy.array([cache.spare_slot if (slot := documents[i].slot) is None else slot for i in numbers]),
            numpy.array([documents[i].start == 0 for i in numbers]),
        ]

    empty = numpy.zeros(filler, numpy.int64)
    positions = numpy.concatenate([*spans, empty])
    arrays = [[positions, numpy.concatenate([*places, empty + cache.spare])], *map(batch, kinds.values())]
    sent = iter(on_device([array for each in arrays for array in each]))
    (row_positions, row_places), *batches = ([next(sent) for _ in each] for each in arrays)
    longest = -(-(width * size or int(positions.max()) + 1) // _ANGLES) * _ANGLES
    return CachedRow(
        qkv_format="thd",
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        total_tokens=len(positions),
        positions=row_positions,
        cache=cache,
        places=row_places,
        batches=tuple(
            CachedBatch(rows, at, table, slots, fresh.bool(), whole=len(rows) == len(positions))
            for rows, at, table, slots, fresh in batches
        ),
    )
