"""What a save, a seal and the verdicts cost rank 0 when there are thousands of ranks, and what they cost each of those.

    python -m tests.benchmarks.ranks [--ranks 8000] [--per-node 8] [--pieces 15] [--terabytes 2]

Real: rank 0 in this process with its store, lease, `checkpoint.publish` of a step, `checkpoint.finish_weights` and seal
of a model, and the words of all ranks, as long as real ones and over a connection of each. Simulated: the ranks are a
few processes with a connection a rank, which say what product code would (jobs/ranks.py, told.py); nothing is trained;
the files of the nodes have their length but no bytes (sparse), so that whoever read them took minutes; the words of a
save, which ranks gather over gloo, come by way of the store. What a rank needs besides its own bytes is measured in
product code (exchange.py) on one rank of a fake process group of that size. A load is what rank 0 reads of a step's
.metadata and tells all (loading.py), and what one of them does with that.

Seconds are CPU seconds of rank 0, its store's thread with it. The peer is torch.distributed.checkpoint with as many
ranks and pieces: what its coordinator does of a save beside the exchange (pickles of plans and results,
DefaultSavePlanner.create_global_plan, FileSystemWriter.finish); it neither hashes nor seals.
"""

import argparse
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_tools.base import rendezvous
from data_tools.base.ports import free_port
from data_tools.base.rendezvous import Meeting, pack_fields, unpack_fields
from jobs.artifacts.artifact import Artifact
from jobs.artifacts.owner import Owner
from jobs.artifacts.seal import read_seal
from jobs.ranks import Rank, Verdicts

LAYERS = 60
MATRICES = ("self_attention.linear_qkv.weight", "self_attention.linear_proj.weight", "mlp.linear_fc1.weight",
            "mlp.linear_fc2.weight", "mlp.linear_fc1.layer_norm_weight")  # fmt: skip
STATES = ("", "optimizer.state.param.", "optimizer.state.exp_avg.")
RNG_BYTES = 27_000
HELPERS = 2  # processes that stand for the ranks


def pieces_of(rank: int, world: int, pieces: int) -> Iterator[tuple[str, tuple[int, int], int]]:
    """Yield key, shape and first row of what a rank writes: rows of some matrices of a layer, and of their states."""
    layer, others = rank % LAYERS, len(range(rank % LAYERS, world, LAYERS))
    for number in range(pieces):
        key = f"{STATES[number % 3]}decoder.layers.{layer}.{MATRICES[number // 3 % 5]}.{number // 15}"
        yield key, (others * 8, 5120), rank // LAYERS * 8


def told_by(rank: int, args: argparse.Namespace) -> Any:
    """Return what a rank tells of a save."""
    from megatron_ext.weights.dist_weights import Piece, Region
    from megatron_ext.weights.told import Told

    file, size = f"__{rank // args.per_node}_0.distcp", part_bytes(args)
    written = [
        Piece(Region(key, shape, (row, 0), (8, 5120)), "float32", file, start=number * 164_992, length=164_960)
        for number, (key, shape, row) in enumerate(pieces_of(rank, args.ranks, args.pieces))
    ]
    sums = {piece.region.key: ("float32", piece.region.shape, 2**62 + rank) for piece in written[::3]}
    return Told(file, (size, f"{rank:064x}"), written, sums, rng=(size - RNG_BYTES, RNG_BYTES), updates=1)


def part_bytes(args: argparse.Namespace) -> int:
    return int(args.terabytes * 1e12) // args.ranks // 64 * 64


# ---------------------------------------------------------------- the other ranks


class Simulated(rendezvous.Client):
    """A rank's connection that need not wait for an answer before another rank asks."""

    def ask(self, *request: bytes) -> None:
        self._socket.settimeout(self.limit_s)
        self._socket.sendall(pack_fields(request))

    def answer(self) -> list[bytes]:
        size = int.from_bytes(rendezvous._receive(self._socket, 4), "big")
        return unpack_fields(rendezvous._receive(self._socket, size))


def others(args: argparse.Namespace, low: int, high: int) -> None:
    """Be the ranks from `low` to below `high`."""
    place = Meeting("127.0.0.1", range(args.port, args.port + 1), "benchmark", key=b"k" * 32)
    ranks = {rank: Simulated(place, 600.0, args.port) for rank in range(max(low, 1), high)}
    first, limit = ranks[max(low, 1)], b"3600"
    own = first.again()

    def all_wait_for(key: str, word: str) -> None:
        for client in ranks.values():
            client.ask(b"get", limit, f"afterok/{key}".encode())
        own.set(f"{word}/{low}", b"1")  # rank 0 speaks when all are waiting
        for client in ranks.values():
            client.answer()

    all_wait_for("lease", "asked")
    told_by(low, args)  # imports
    began = time.process_time()
    words = [told_by(rank, args).packed() for rank in ranks]
    each = (time.process_time() - began) / len(ranks)
    own.multi_set([f"word/{rank}" for rank in ranks], words)
    for rank, client in ranks.items():
        client.ask(b"set", f"afterok/done/{rank}".encode(), b"")
        client.answer()
    all_wait_for("sealed", "waiting")
    for rank, client in ranks.items():
        client.ask(b"set", f"afterok/bye/{rank}".encode(), b"1")
    for client in ranks.values():
        client.answer()
    print(json.dumps({"tell_ms": each * 1e3, "word": max(map(len, words))}))


# ---------------------------------------------------------------- rank 0


def rank_zero(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Be rank 0; return CPU seconds, bytes and counts."""
    from megatron_ext.device import init_device

    init_device()
    from megatron_ext.weights import checkpoint
    from megatron_ext.weights.told import everything

    port, found = free_port(), {}
    own = [*sys.argv[1:], "--port", str(port)]
    bounds = [args.ranks * i // HELPERS for i in range(HELPERS + 1)]
    verdicts = Verdicts(
        Rank(0, 0, args.ranks), lambda: Meeting("127.0.0.1", range(port, port + 1), "benchmark", b"k" * 32)
    )
    assert verdicts.store is not None
    helpers = [
        subprocess.Popen([sys.executable, "-m", __spec__.name, *own, "--simulate", str(low), str(high)],
                         stdout=subprocess.PIPE, text=True)
        for low, high in zip(bounds, bounds[1:])
    ]  # fmt: skip
    artifact = Artifact(folder / "sft" / "KEY")

    def measured(name: str, function: Callable[[], Any]) -> Any:
        cpu, wall = time.process_time(), time.monotonic()
        result = function()
        found[name] = {"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - wall}
        return result

    def met() -> None:
        verdicts.store.multi_get([f"asked/{low}" for low in bounds[:-1]])

    measured("meeting", met)
    lease = measured("lease", lambda: begin(verdicts, artifact))
    names = [f"word/{rank}" for rank in range(1, args.ranks)]
    words = [told_by(0, args).packed(), *verdicts.store.multi_get(names)]
    keep = folder / "checkpoints"
    (keep / ".step_1.tmp" / "state").mkdir(parents=True)
    before = resident()
    facts = {"step": 1, "identity": {}, "position": {}, "layout": "", "vocabulary": 1}
    measured("save", lambda: checkpoint.publish(keep / ".step_1.tmp", keep / "step_1", everything(words), facts))
    fill(lease.folder / "weights", args)
    read = bytes_read()
    measured("weights", lambda: checkpoint.finish_weights(lease.folder / "weights", everything(words)))
    found["rank_0_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) / 1e6 - before
    measured("done", lambda: verdicts.gather("done"))
    verdicts.store.multi_get([f"waiting/{low}" for low in bounds[:-1]])
    measured("seal", lambda: verdicts.decide("sealed", lambda: artifact.seal(lease, {"key": "k"})))
    found["read_mb"] = (bytes_read() - read) / 1e6
    measured("goodbye", verdicts.goodbye)
    table = measured("load", lambda: told_of_load(keep / "step_1" / "state"))
    found["told_mb"], before = len(table) / 1e6, resident()
    wanted = {key: [((row, 0), (8, 5120))] for key, _, row in pieces_of(1, args.ranks, args.pieces)}
    parts = measured("load of another", lambda: pickle.loads(table).cut(wanted))
    found["load_mb"] = resident() - before
    assert sum(len(tensor.pieces) for tensor in parts.tensors.values()) == args.pieces
    seal = read_seal(artifact.seal_path)
    assert seal is not None
    found["sealed_tb"] = sum(entry["size"] for entry in seal.content["files"].values()) / 1e12
    found["files"] = -(-args.ranks // args.per_node) + sum(path.is_file() for path in (keep / "step_1").rglob("*"))
    told = [json.loads(helper.communicate(timeout=600)[0]) for helper in helpers]
    return found | {name: max(each[name] for each in told) for name in told[0]}


def told_of_load(folder: Path) -> bytes:
    """Return what rank 0 tells all others when a checkpoint is loaded: what it keeps where."""
    from megatron_ext.files.stored import Table
    from megatron_ext.weights.dist_weights import Reader

    return pickle.dumps(Table.of(Reader(folder).stored))


def begin(verdicts: Verdicts, artifact: Artifact) -> Any:
    taken = []

    def lease() -> str:
        taken.append(artifact.acquire(0, Owner.me(1, 0), lambda job: False))
        return str(taken[0].folder)

    verdicts.decide("lease", lease)
    return taken[0]


def fill(weights: Path, args: argparse.Namespace) -> None:
    """Make the nodes' files, as long as they would be."""
    weights.mkdir(parents=True)
    for node in range(-(-args.ranks // args.per_node)):
        own = min(args.per_node, args.ranks - node * args.per_node)
        with open(weights / f"__{node}_0.distcp", "wb") as file:
            file.truncate(own * part_bytes(args))


def resident() -> float:
    """Return the memory of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def bytes_read() -> int:
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


# ---------------------------------------------------------------- any other rank, and the peer


def one_rank(args: argparse.Namespace) -> dict[str, Any]:
    """Return the memory that one rank of all needs for telling what it wrote, and for knowing where to write it."""
    from megatron_ext.device import init_device

    init_device()
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_ext.weights import exchange

    def save(world: int) -> float:
        dist.init_process_group("fake", rank=1, world_size=world, store=FakeStore())
        before = resident()
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        exchange.place(part_bytes(args), None)
        assert exchange.to_rank_zero(told_by(1, args).packed(), None) == []
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        dist.destroy_process_group()
        return int(peak.split()[1]) * 1024 / 1e6 - before

    save(16)  # what is imported and made once
    return {"rank_mb": save(args.ranks)}


def all_gathered(args: argparse.Namespace) -> dict[str, Any]:
    """Return what each rank got and did when every rank was told what all wrote, as it was before."""
    blobs = [pickle.dumps((told_by(rank, args).pieces, {}, 1, {})) for rank in range(args.ranks)]
    before, began = resident(), time.process_time()
    parts = [pickle.loads(blob) for blob in blobs]
    return {"cpu_s": time.process_time() - began, "mb": resident() - before, "got_mb": sum(map(len, blobs)) / 1e6,
            "ranks": len(parts)}  # fmt: skip


def torchs_coordinator(args: argparse.Namespace) -> dict[str, Any]:
    """Return what torch's coordinator does of a save, in CPU seconds."""
    import torch
    from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
    from torch.distributed.checkpoint.storage import WriteResult

    def item(key: str, shape: tuple[int, int], row: int) -> WriteItem:
        chunk = ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((8, 5120)))
        data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(shape))
        return WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)

    plans, results = [], []
    for rank in range(args.ranks):
        items = [item(*piece) for piece in pieces_of(rank, args.ranks, args.pieces)]
        plans.append(pickle.dumps(SavePlan(items)))
        places = (_StorageInfo(f"__{rank}_0.distcp", number * 164_992, 164_960) for number in range(args.pieces))
        results.append(pickle.dumps([WriteResult(i.index, 164_960, place) for i, place in zip(items, places)]))
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        planner = DefaultSavePlanner(flatten_state_dict=False)
        planner.set_up_planner({}, None, is_coordinator=True)
        whole, metadata = planner.create_global_plan([pickle.loads(plan) for plan in plans])
        for plan in whole:
            pickle.dumps(plan)  # to each rank its own
        FileSystemWriter(folder).finish(metadata, [pickle.loads(result) for result in results])
        return {"cpu_s": time.process_time() - began}


def apart(words: list[str], name: str) -> dict[str, Any]:
    """Run one of the parts above in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, *words, "--only", name]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8000)
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--pieces", type=int, default=15)
    parser.add_argument("--terabytes", type=float, default=2.0)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--simulate", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.simulate:
        return others(args, *args.simulate)
    if args.only:
        return print(
            json.dumps(
                {"one_rank": one_rank, "all_gathered": all_gathered, "torch": torchs_coordinator}[args.only](args)
            )
        )
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
    try:
        found = rank_zero(args, folder)
    finally:
        shutil.rmtree(folder)
    found |= apart(sys.argv[1:], "one_rank")
    before, peer = apart(sys.argv[1:], "all_gathered"), apart(sys.argv[1:], "torch")
    for name in ("meeting", "lease", "save", "weights", "done", "seal", "goodbye"):
        print(f"rank 0, {name}: {found[name]['cpu_s']:.2f} CPU s, {found[name]['wall_s']:.2f} s")
    print(f"rank 0 holds {found['rank_0_mb']:.0f} MB for a save")
    print(f"rank 0 read {found['read_mb']:.1f} MB to seal {found['sealed_tb']:.2f} TB")
    print(f"a rank tells {found['word']} bytes in {found['tell_ms']:.2f} CPU ms, and needs {found['rank_mb']:.1f} MB")
    print(f"a step has {found['files']} files")
    load, other = found["load"]["cpu_s"], found["load of another"]["cpu_s"]
    print(f"load: rank 0 reads what is where in {load:.2f} CPU s and tells {found['told_mb']:.1f} MB")
    print(f"load: any other rank finds its own there in {other:.3f} CPU s, {found['load_mb']:.1f} MB")
    print(f"before: every rank got {before['got_mb']:.0f} MB, {before['cpu_s']:.2f} CPU s, {before['mb']:.0f} MB held")
    print(f"torch's coordinator: {peer['cpu_s']:.2f} CPU s")
    save, seal = found["save"]["cpu_s"], sum(found[name]["cpu_s"] for name in ("weights", "done", "seal"))
    print(
        json.dumps(
            {
                "name": "ranks",
                "ours": round(save, 2),
                "peer": round(peer["cpu_s"], 2),
                "ratio": round(peer["cpu_s"] / save, 2),
                "unit": "CPU s of rank 0 for a save",
                "save_and_seal_s": round(save + seal, 2),
                "rank_mb": round(found["rank_mb"], 1),
                "ranks": args.ranks,
                "files": found["files"],
            }
        )
    )


if __name__ == "__main__":
    main()
