"""One stream of packs out of several pack plans, each over its own store, in exact proportion."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.base.durable import canonical_json, sha256_bytes
from data_tools.mistake import Problem, UserMistake
from data_tools.packs.batches import deal
from data_tools.packs.plan import Pack, PackReader


class BlendedPacks:
    """Says what PackReader offers, over several of them. Pack i is the first reader's i-th, then the second's, and so
    on.

    Of `p` places of the stream a reader with share w of the weights has between p·w - 1 and p·w + 1 (blend.py), each
    reader's packs in the order that it has alone. Raise UserMistake where their packs differ in length.
    """

    def __init__(self, readers: Sequence[PackReader], weights: Sequence[float]):
        self.readers, self.weights = list(readers), [float(weight) for weight in weights]
        lengths = [reader.pack_length for reader in self.readers]
        if len(set(lengths)) > 1:
            raise UserMistake(Problem("blend_packs", f"packs of {lengths} tokens cannot be blended: pack them alike"))
        self.pack_length = lengths[0]
        self.n_packs = sum(reader.n_packs for reader in self.readers)
        self.digest = sha256_bytes(canonical_json([self.weights, *(reader.digest for reader in self.readers)]))
        self._first = np.cumsum([0, *(reader.n_packs for reader in self.readers)])
        self._sources = np.empty(0, dtype=np.int64)
        # One measure for all, the first one's: ranks are to be loaded evenly.
        linear, quadratic = self.readers[0].facts["cost"]
        self._costs = np.concatenate([reader.plan.costs(linear, quadratic) for reader in self.readers])

    def batch(self, k: int, global_batch: int, seed: int) -> list[int]:
        """Return the packs of global batch k (from 0), whatever the number of ranks."""
        first, last = k * global_batch, (k + 1) * global_batch
        if last > len(self._sources):
            from data_tools.base.blend import sources_of  # loads a compiler

            self._sources = sources_of(np.array(self.weights), 2 * last)
        counts = np.bincount(self._sources[:first], minlength=len(self.readers))
        packs = []
        for source in self._sources[first:last].tolist():
            (own,) = self.readers[source].batch(int(counts[source]), 1, seed)
            packs.append(int(self._first[source]) + own)
            counts[source] += 1
        return packs

    def share(self, k: int, global_batch: int, seed: int, rank: int, ranks: int) -> list[int]:
        """Return those of them that data-parallel rank `rank` of `ranks` trains, in order, dealt by predicted cost."""
        packs = np.array(self.batch(k, global_batch, seed))
        return packs[deal(self._costs[packs], ranks)[:, rank]].tolist()

    def _own(self, i: int) -> tuple[PackReader, int]:
        source = int(np.searchsorted(self._first, i, side="right")) - 1
        return self.readers[source], i - int(self._first[source])

    def pack(self, i: int) -> Pack:
        reader, own = self._own(i)
        return reader.pack(own)

    def padding(self, i: int) -> int:
        reader, own = self._own(i)
        return reader.padding(own)


def read_packs(stores: Sequence[str], packs: Sequence[str], weights: Sequence[float] = ()) -> PackReader | BlendedPacks:
    """Return the packs of one plan over its store, or of several with `weights`."""
    readers = [PackReader(Path(store), Path(plan)) for store, plan in zip(stores, packs)]
    return BlendedPacks(readers, weights) if len(readers) > 1 else readers[0]
