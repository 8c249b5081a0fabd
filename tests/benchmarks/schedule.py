"""Predicted efficiency of the batches' schedule beside shuffled full packs, on agentic trajectories.

    python -m tests.benchmarks.schedule [--documents 200000] [--ranks 8] [--batch 64]

Efficiency: the ranks' mean work over the work of the slowest, where they wait for one another once a step, or at every
micro-batch. The peer is what packing tools do: full packs, shuffled, dealt in turn.
"""

import argparse
import json

import numpy as np

from data_tools.packs.batches import Stream, idle_shares
from data_tools.packs.best_fit import best_fit, longest_first
from tests.benchmarks.pack import CAPACITY, distributions


def pack_costs(lengths: np.ndarray) -> np.ndarray:
    """float64[packs] in units of attention; 24,576 linear: verl's constant for a 7B model."""
    ordered = lengths[longest_first(lengths, CAPACITY)]
    packs, _ = best_fit(ordered, CAPACITY)
    ordered = ordered.astype(np.float64)
    return np.bincount(packs, 24_576 * ordered + ordered**2)


def shuffled(costs: np.ndarray, batch: int, ranks: int) -> tuple[float, float]:
    steps = len(costs) // batch
    order = np.random.default_rng(0).permutation(len(costs))[: steps * batch]
    dealt = costs[order].reshape(steps, batch // ranks, ranks)
    work = dealt.sum() / ranks
    return work / dealt.sum(axis=1).max(axis=1).sum(), work / dealt.max(axis=2).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    found = {}
    for name, lengths in distributions(args.documents).items():
        costs = pack_costs(lengths)
        source = np.zeros(len(costs), dtype=np.int16)
        peer = shuffled(costs, args.batch, args.ranks)
        for group in (1, args.ranks):
            idle = idle_shares(Stream(costs, source, group=group), args.batch, args.ranks, len(costs) // args.batch)
            found[name, group] = (1 - idle[0], 1 - idle[1], *peer)
            print(
                f"{name:8} groups of {group}: a step {1 - idle[0]:.3f} (shuffled {peer[0]:.3f}), "
                f"a micro-batch {1 - idle[1]:.3f} (shuffled {peer[1]:.3f})"
            )
    step, micro, peer_step, peer_micro = found["agentic", 1]
    print(
        json.dumps(
            {
                "name": "schedule",
                "ours": round(step, 4),
                "peer": round(peer_step, 4),
                "ratio": round(step / peer_step, 3),
                "unit": "step efficiency",
                "micro_batch_grouped": round(found["agentic", args.ranks][1], 4),
                "micro_batch_peer": round(peer_micro, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
