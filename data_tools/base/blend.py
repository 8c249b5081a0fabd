"""Blends: which source each place of an endless stream takes, in exact proportion over every prefix."""

import numpy as np

from data_tools.base.compiled import compiled


def sources_of(weights: np.ndarray, length: int) -> np.ndarray:
    """Return int64[length], the source of each of the first places; those of a shorter length are its beginning.

    Weights are positive, or 0 for none. Of a source with share w, every prefix of p places holds more than p·w - 1 and
    fewer than p·w + 1: of the sources not ahead of their share, the one goes first whose next place is due first.
    As a schedule of unit tasks on one machine this meets every deadline (Tijdeman, Discrete Math. 32, 1980).
    """
    return _sources_of(np.asarray(weights, dtype=np.float64) / np.sum(weights), length)


@compiled()
def _sources_of(shares: np.ndarray, length: int) -> np.ndarray:
    given = np.zeros(len(shares), dtype=np.int64)
    out = np.empty(length, dtype=np.int64)
    for place in range(length):
        chosen, first_due = -1, np.inf
        for source in range(len(shares)):
            if given[source] < shares[source] * (place + 1) - 1e-9:
                due = (given[source] + 1) / shares[source]
                if due < first_due:
                    chosen, first_due = source, due
        out[place] = chosen
        given[chosen] += 1
    return out
