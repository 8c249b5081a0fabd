"""Which packs make up global batch k, in which order, and which data-parallel rank trains which.

The stream of packs is endless: place p holds one pack, and global batch k of size B is places [k·B, (k+1)·B). It is a
pure function of the plan and a seed; the number of ranks never enters. Without weights it runs through shuffled epochs.
With weights every source has epochs of its own, and each prefix of p places holds between p·w - 1 and p·w + 1 packs of
a source with share w.

Time: ranks wait for the slowest at the end of a step (data parallelism) or of every micro-batch (experts or pipelines
across ranks). A pack's predicted cost is linear·ΣL + quadratic·ΣL² over its documents (attention), and full packs
differ by a factor of 3 to 6. Two things even that out: `deal` gives a batch's packs to ranks in rows of similar cost,
and `group` > 1 puts so many packs of nearly equal cost side by side in the stream, groups in shuffled order.
"""

from dataclasses import dataclass, field

import numpy as np

from data_tools.base.seeded import permutation


@dataclass
class Stream:
    """Represents the endless order of a plan's packs.

    costs float64[packs] in any unit; source int64[packs] with the index of each pack's source in `weights`, which
    holds the shares of packs wanted (empty: one source, all packs).
    """

    costs: np.ndarray
    source: np.ndarray
    weights: tuple[float, ...] = ()
    group: int = 1
    seed: int = 0
    _members: list[np.ndarray] = field(init=False, repr=False)
    _epochs: dict[int, tuple[int, np.ndarray]] = field(init=False, repr=False, default_factory=dict)
    _blend: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kept = [np.flatnonzero(self.source == s) for s in range(len(self.weights))] or [np.arange(len(self.costs))]
        self._members = [members[np.argsort(-self.costs[members], kind="stable")] for members in kept]
        self._blend = np.empty(0, dtype=np.int64)

    def batch(self, k: int, size: int) -> np.ndarray:
        """Return int64[size], the packs of global batch `k`, which counts from 0."""
        first, last = k * size, (k + 1) * size
        if not self.weights:
            return np.array([self._pack(0, place) for place in range(first, last)], dtype=np.int64)
        if last > len(self._blend):
            from data_tools.base.blend import sources_of  # loads a compiler, which most runs need not

            self._blend = sources_of(np.array(self.weights), 2 * last)
        counts = np.bincount(self._blend[:first], minlength=len(self.weights))
        packs = []
        for source in self._blend[first:last].tolist():
            packs.append(self._pack(source, int(counts[source])))
            counts[source] += 1
        return np.array(packs, dtype=np.int64)

    def _pack(self, source: int, ordinal: int) -> int:
        epoch, place = divmod(ordinal, len(self._members[source]))
        return int(self._epoch(source, epoch)[place])

    def _epoch(self, source: int, epoch: int) -> np.ndarray:
        """Return the packs of a source in the order of an epoch; the last one is kept, which changes time and no
        answer."""
        if self._epochs.get(source, (-1,))[0] != epoch:
            members = self._members[source]
            whole = len(members) // self.group * self.group  # what is left over by the groups comes last
            purpose = "pack epoch" if not self.weights else f"pack epoch of source {source}"
            order = permutation(purpose, self.seed, epoch, whole // self.group)
            groups = members[:whole].reshape(-1, self.group)[order]
            self._epochs[source] = epoch, np.concatenate([groups.ravel(), members[whole:]])
        return self._epochs[source][1]


def deal(costs: np.ndarray, ranks: int) -> np.ndarray:
    """Return int64[micro-batches, ranks], the places of a batch's `costs`: column r is what rank r trains, in that
    order.

    Rows hold packs of similar cost, the dearest first; in each the dearest goes to the rank with the least so far.
    """
    rows = np.argsort(-costs, kind="stable").reshape(-1, ranks)
    totals = np.zeros(ranks)
    dealt = np.empty_like(rows)
    for place, row in enumerate(rows):
        order = np.argsort(totals, kind="stable")
        dealt[place, order] = row
        totals[order] += costs[row]
    return dealt


def idle_shares(stream: Stream, batch: int, ranks: int, steps: int) -> tuple[float, float]:
    """Return the predicted shares of the ranks' time spent waiting over the first `steps`: once a step, once a
    micro-batch."""
    work = waited_step = waited_micro = 0.0
    for k in range(steps):
        costs = stream.costs[stream.batch(k, batch)]
        dealt = costs[deal(costs, ranks)]
        work += dealt.sum() / ranks
        waited_step += dealt.sum(axis=0).max()
        waited_micro += dealt.max(axis=1).sum()
    return 1 - work / waited_step, 1 - work / waited_micro
