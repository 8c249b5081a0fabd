"""Decoding by recorded passes: one CUDA graph for each padded shape, replayed with the tokens of the step.

A pass over a few hundred tokens is bound by the launches of its kernels, which a graph makes in one call (Megatron-LM
and vLLM do the same). On CPU the pass is simply run again over the same padded inputs. Not yet run on a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy
import torch

from megatron_ext.device import record
from megatron_ext.rollout.cache import Cache, CachedRow, NewTokens, cached_row, on_device

Pass = Callable[[torch.Tensor, CachedRow], torch.Tensor]  # tokens [1, n] and their row -> logits [n, V / t]


class Graphs:
    """The recorded passes. They are valid while the cache's memory stays where it is: `forget` them with it."""

    def __init__(self, forward: Pass, cache: Cache, unit: int):
        self.forward, self.cache, self.unit = forward, cache, unit  # tokens of a row come in multiples of `unit`
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    def logits(self, documents: Sequence[NewTokens]) -> torch.Tensor:
        """Return [n, V / t] after each of `documents`, of one token each; the next pass of this shape overwrites it."""
        rows = self.unit * _power_of_two(-(-len(documents) // self.unit))
        shape = rows, _power_of_two(max(len(document.blocks) for document in documents))
        filler = NewTokens((0,), 0, [self.cache.spare // self.cache.block_size])
        row = cached_row([*documents, *[filler] * (shape[0] - len(documents))], self.cache, width=shape[1])
        ids = [document.tokens[0] for document in documents] + [0] * (shape[0] - len(documents))
        (tokens,) = on_device([numpy.array([ids])])
        if shape not in self._recorded:
            self._recorded[shape] = _Recorded(self.forward, tokens, row)
        return self._recorded[shape].run(tokens, row)[: len(documents)]

    def forget(self) -> None:
        """Drop all recorded passes."""
        self._recorded.clear()


class _Recorded:
    """A recorded pass of one shape: its inputs stay where they were, and get the numbers of each pass."""

    def __init__(self, forward: Pass, tokens: torch.Tensor, row: CachedRow):
        self.inputs, self.row = _inputs(tokens, row), row

        def again() -> torch.Tensor:
            # The turns of rotary positions are part of the pass; the table they are taken from must outlive it.
            self.latest = replace(row, _turns={})
            return forward(tokens, self.latest)

        self.replay = record(again)

    def run(self, tokens: torch.Tensor, row: CachedRow) -> torch.Tensor:
        """Return the logits of the pass over other numbers of the same shape."""
        for held, new in zip(self.inputs, _inputs(tokens, row)):
            held.copy_(new)
        return self.replay()


def _inputs(tokens: torch.Tensor, row: CachedRow) -> tuple[torch.Tensor, ...]:
    """Return what differs between two passes of one shape."""
    (batch,) = row.batches
    return tokens, row.positions, row.places, batch.positions, batch.table


def _power_of_two(n: int) -> int:
    """Return the least power of two that is no less than `n`."""
    return 1 << (n - 1).bit_length()
