"""Packing lengths into 262,144 tokens beside TRL's best-fit decreasing, and what a pack costs to read.

    python -m tests.benchmarks.pack [--documents 1000000] [--large 10000000]

The peer is the loop of TRL's `pack_dataset(strategy="bfd")` over its own segment tree, without the tokens.
"""

import argparse
import gc
import json
import math
import tempfile
import time
from collections import defaultdict, deque
from pathlib import Path

import numpy as np

from data_tools.packs.best_fit import best_fit, longest_first

CAPACITY = 262_144


def lognormal(random: np.random.Generator, median: float, sigma: float, n: int) -> np.ndarray:
    return np.clip(random.lognormal(math.log(median), sigma, n), 16, CAPACITY).astype(np.int32)


def distributions(n: int) -> dict[str, np.ndarray]:
    """int32[n] lengths in tokens, five kinds: data.md D."""
    random = np.random.default_rng(0)
    short, reason, agentic = n * 7 // 10, n // 4, n - n * 7 // 10 - n // 4
    mixed = [
        lognormal(random, 600, 0.9, short),
        lognormal(random, 6_000, 0.8, reason),
        lognormal(random, 20_000, 1, agentic),
    ]
    return {
        "agentic": lognormal(random, 20_000, 1.0, n),
        "reason": lognormal(random, 6_000, 0.8, n),
        "short": lognormal(random, 600, 0.9, n),
        "mixed": random.permutation(np.concatenate(mixed)),
        "hard": (random.uniform(0.10, 0.55, n) * CAPACITY).astype(np.int32),
    }


def ours(lengths: np.ndarray) -> int:
    return best_fit(lengths[longest_first(lengths, CAPACITY)], CAPACITY)[1]


def trl(lengths: np.ndarray) -> int:
    from trl.data_utils import _SegmentTree

    tree = _SegmentTree(CAPACITY)
    tree.add(CAPACITY)
    waiting: dict[int, deque] = defaultdict(deque)
    bins: list[dict] = []
    order = np.argsort(-lengths, kind="stable")
    for length, index in zip(lengths[order], order):
        space = tree.search(length)
        if space < CAPACITY:
            chosen = waiting[space].popleft()
        else:
            chosen = {"ids": [], "length": 0}
            bins.append(chosen)
        chosen["ids"].append(index)
        chosen["length"] += length
        if space < CAPACITY and not waiting[space]:
            tree.remove(space)
        waiting[space - length].append(chosen)
        if space > length:
            tree.add(space - length)
    return len(bins)


def seconds(call, *arguments) -> tuple[float, int]:
    start = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - start, result


def grown(call, *arguments) -> float:
    """MiB by which the process's resident memory peaks over where it stood."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def status(key: str) -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

    before = status("VmRSS")
    call(*arguments)
    return (status("VmHWM") - before) / 1024


def read_a_pack() -> float:
    """Milliseconds to read a random full pack of a store of 64 packs, the median."""
    from data_tools.packs.pack import Config, pack
    from data_tools.packs.plan import PackReader
    from data_tools.packs.store import Provenance, StoreWriter, row_text

    with tempfile.TemporaryDirectory() as folder:
        store, plan = Path(folder, "store"), Path(folder, "plan")
        store.mkdir()
        plan.mkdir()
        writer = StoreWriter(store)
        random = np.random.default_rng(0)
        for line, length in enumerate(lognormal(random, 20_000, 1.0, 600).tolist()):
            ids = random.integers(0, 150_000, length, dtype=np.int32)
            writer.add(ids, np.ones(length, np.uint8), Provenance(0, line, row_text("", "")))
        writer.close()
        pack(Config(store=str(store), pack_length=CAPACITY), plan)
        reader = PackReader(store, plan)
        chosen = random.integers(0, reader.n_packs, 200).tolist()
        return 1000 * float(np.median([seconds(reader.pack, i)[0] for i in chosen]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--large", type=int, default=10_000_000)
    args = parser.parse_args()
    ours(np.array([1, 2], dtype=np.int32))  # compiles
    total = {"ours": 0.0, "peer": 0.0}
    lengths_of = distributions(args.documents)
    memory = grown(ours, lengths_of["agentic"])  # first: later calls reuse what the allocator kept
    for name, lengths in lengths_of.items():
        mine_s, mine = seconds(ours, lengths)
        peer_s, peer = seconds(trl, lengths)
        total["ours"] += mine_s
        total["peer"] += peer_s
        bound = -(-int(lengths.sum(dtype=np.int64)) // CAPACITY)
        print(
            f"{name:8} {len(lengths):,} documents: ours {mine_s:.3f} s, {mine:,} packs; TRL {peer_s:.2f} s, "
            f"{peer:,} packs; lower bound {bound:,}; {peer_s / mine_s:.0f} times"
        )
    large_s, _ = seconds(ours, distributions(args.large)["agentic"])
    read_ms = read_a_pack()
    print(
        f"agentic {args.large:,} documents: ours {large_s:.2f} s; memory beyond the lengths, "
        f"{args.documents:,} documents: {memory:.0f} MiB; reading one pack of {CAPACITY:,} tokens: {read_ms:.2f} ms"
    )
    print(
        json.dumps(
            {
                "name": "pack",
                "ours": round(total["ours"] / 5, 4),
                "peer": round(total["peer"] / 5, 3),
                "ratio": round(total["peer"] / total["ours"], 1),
                "unit": "s",
                "memory_mib": round(memory, 1),
                "large_s": round(large_s, 3),
                "read_pack_ms": round(read_ms, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
