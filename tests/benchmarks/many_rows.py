"""What a training rank holds and how soon it has its first batch, of a store of 100,000,000 rows.

    python -m tests.benchmarks.many_rows [--rows 100000000] [--tokens 64] [--documents 128] [--folder DIR]

The store is sparse: its indices and the plan are written, 4.7 GB at 1e8 rows, while token ids, masks and provenance
are holes in their files. Each pack has `documents` rows of `tokens` tokens. A process of its own opens both, as a rank
does, and makes the packs of its first batches. Private memory is what Linux counts as the process's own (VmRSS without
RssFile) beyond what it had before; mapped pages are shared by the ranks of a node and given back under pressure.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_tools.base.durable import write_json
from data_tools.packs import plan as plans
from data_tools.packs import store as stores
from data_tools.packs.plan import PackReader, PlanFacts, sums_of

BLOCK = 1 << 20
BATCH, STEPS, RANKS = 64, 3, 8


def blocks(count: int) -> Iterable[np.ndarray]:
    return (np.arange(start, min(start + BLOCK, count), dtype=np.int64) for start in range(0, count, BLOCK))


def write_store(folder: Path, rows: int, tokens: int) -> None:
    """Write a store of equal rows, of which only the indices lie on the disk."""
    folder.mkdir(parents=True)
    for name, dtype in ((stores.TOKENS, np.dtype(np.int32)), (stores.LOSS_MASK, np.dtype(np.uint8))):
        with open(folder / f"{name}.idx", "wb") as file:
            header = (stores._MAGIC, stores._VERSION, stores._DTYPE_CODES[dtype], rows, rows + 1)
            file.write(stores._HEADER.pack(*header))
            for block in blocks(rows):
                file.write(np.full(len(block), tokens, "<i4").tobytes())
            for block in blocks(rows):
                file.write((block * tokens * dtype.itemsize).astype("<i8").tobytes())
            file.truncate(stores._HEADER.size + 20 * rows + 8)
        with open(folder / f"{name}.bin", "wb") as file:
            file.truncate(rows * tokens * dtype.itemsize)
    few = {name: np.zeros((1, *stores.RECORD[name].shape), stores.RECORD[name].base) for name in stores._COLUMNS}
    stores._write_npz(folder / stores.ROWS, few)
    _stretch(folder / stores.ROWS, rows)
    write_json(folder / stores.FACTS, {"rows": rows, "tokens": rows * tokens, "supervised": 0, "sha256": {}})


def _stretch(path: Path, rows: int) -> None:
    """Write the archive anew, sparse: headers for `rows` zeros in each column, and holes for the zeros."""
    from data_tools.base import mapped_npz

    with open(path, "rb") as file:
        names = list(mapped_npz.columns(file))
    with open(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            dtype, shape = stores.RECORD[name].base, (rows, *stores.RECORD[name].shape)
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                size = int(np.prod(shape)) * dtype.itemsize
                file.seek(size, 1)
                member._file_size += size  # what zipfile counts of what is written
                member._compress_size = member._file_size


def write_plan(folder: Path, store: Path, rows: int, documents: int) -> None:
    """Write the plan that has the rows in order, so many in each pack."""
    folder.mkdir()
    packs = -(-rows // documents)
    ptr = np.minimum(np.arange(packs + 1, dtype=np.int64) * documents, rows)
    opened = stores.Store(store)
    tokens = int(opened.lengths[0])
    columns: dict[str, np.ndarray] = {
        "pack_ptr": ptr,
        "doc_ids": np.arange(rows, dtype=np.int64),
        "starts": np.broadcast_to(np.int64(0), rows),
        "lengths": np.broadcast_to(np.int32(tokens), rows),
        "source": np.zeros(packs, dtype=np.int16),
    }
    stores._write_npz(folder / plans.PLAN, columns)
    facts: PlanFacts = {
        "pack_length": documents * tokens, "align": 1, "order": "decreasing", "seed": 0, "weights": [], "group": 1,
        "cost": [1.0, 0.0], "packs": packs, "documents": rows, "overlong": 0, "tokens": rows * tokens, "padded": 0,
        "targets": 0, "store": opened.digest, "plan": "", "crc32": sums_of(folder),
    }  # fmt: skip
    write_json(folder / plans.FACTS, facts)


def private_mib() -> float:
    """Return the memory that is this process's own, in MiB."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(told[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024


class Peak:
    """Watches the private memory of this process."""

    def __init__(self) -> None:
        self.before = self.most = private_mib()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, private_mib())

    def stop(self) -> float:
        """Return the most that was held beyond what was held at first."""
        self._over.set()
        self._thread.join()
        return self.most - self.before


def rank(store: Path, plan: Path) -> dict[str, float]:
    """Be a rank up to its first batches."""
    peak, began, cpu = Peak(), time.monotonic(), time.process_time()
    reader = PackReader(store, plan)
    opened = time.monotonic()
    own = reader.share(0, BATCH, seed=1, rank=0, ranks=RANKS)
    tokens = sum(len(reader.pack(place).ids) for place in own)
    first = time.monotonic()
    cpu = time.process_time() - cpu
    for step in range(1, STEPS):
        for place in reader.share(step, BATCH, seed=1, rank=0, ranks=RANKS):
            reader.pack(place)
    return {
        "private_mib": round(peak.stop(), 1), "open_s": round(opened - began, 2),
        "first_batch_s": round(first - began, 2),
        "cpu_s": round(cpu, 2), "tokens": tokens, "packs": reader.n_packs,
    }  # fmt: skip


def measured(store: Path, plan: Path) -> dict[str, float]:
    """Return what a rank in a process of its own told."""
    command = [sys.executable, "-m", "tests.benchmarks.many_rows", "--rank", str(store), str(plan)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rank", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        return print(json.dumps(rank(*args.rank)))
    folder = Path(tempfile.mkdtemp(prefix="aok-rows-", dir=args.folder))
    try:
        store, plan = folder / "store", folder / "plan"
        write_store(store, args.rows, args.tokens)
        write_plan(plan, store, args.rows, args.documents)
        told = [measured(store, plan) for _ in range(2)]  # the first one reads the disk, perhaps
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{args.rows:,} rows, {args.documents} a pack: {told[0]}, once more {told[1]}")
    print(json.dumps({"name": "many_rows", "rows": args.rows, **told[1]}))


if __name__ == "__main__":
    main()
