"""Decoding by recorded passes: one CUDA graph for each padded shape, replayed with the tokens of the step.

A pass over a few hundred tokens is bound by the launches of its kernels, which a graph makes in one call (Megatron-LM
and vLLM do the same). On CPU the pass is simply run again over the same padded inputs. Not yet run on a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from megatron_ext.device import record
from megatron_ext.rollout.cache import Cache, CachedRow, Share, cached_row

Pass = Callable[[torch.Tensor, CachedRow], torch.Tensor]  # tokens [1, n] and their row -> logits [n, V / t]


class Graphs:
    """The recorded passes. Valid while the cache's memory stays where it is: `forget` them with it."""

    def __init__(self, forward: Pass, cache: Cache, unit: int):
        self.forward, self.cache, self.unit = forward, cache, unit  # tokens of a row come in multiples of `unit`
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    def logits(self, shares: Sequence[Share]) -> torch.Tensor:
        """[n, V / t] after each of `shares`, of one token each; overwritten by the next pass of this shape."""
        rows = self.unit * _power_of_two(-(-len(shares) // self.unit))
        shape = rows, _power_of_two(max(len(share.blocks) for share in shares))
        filler = Share((0,), 0, [self.cache.spare // self.cache.block_size])
        row = cached_row([*shares, *[filler] * (shape[0] - len(shares))], self.cache, width=shape[1])
        ids = [share.tokens[0] for share in shares] + [0] * (shape[0] - len(shares))
        tokens = torch.tensor([ids], device=self.cache.target)
        if shape not in self._recorded:
            self._recorded[shape] = _Recorded(self.forward, tokens, row)
        return self._recorded[shape].run(tokens, row)[: len(shares)]

    def forget(self) -> None:
        self._recorded.clear()


class _Recorded:
    """One shape: its inputs stay where they were when it was recorded, and get the numbers of each pass."""

    def __init__(self, forward: Pass, tokens: torch.Tensor, row: CachedRow):
        self.inputs, self.row = _inputs(tokens, row), row

        def again() -> torch.Tensor:
            # The turns of rotary positions are part of the pass; the table they are taken from must outlive it.
            self.latest = replace(row, _turns=None)
            return forward(tokens, self.latest)

        self.replay = record(again)

    def run(self, tokens: torch.Tensor, row: CachedRow) -> torch.Tensor:
        for held, new in zip(self.inputs, _inputs(tokens, row)):
            held.copy_(new)
        return self.replay()


def _inputs(tokens: torch.Tensor, row: CachedRow) -> tuple[torch.Tensor, ...]:
    """What differs between two passes of one shape."""
    (batch,) = row.batches
    return tokens, row.positions, row.places, batch.positions, batch.table


def _power_of_two(n: int) -> int:
    """The least that is no less than `n`."""
    return 1 << (n - 1).bit_length()
