"""What ranks tell each other around a checkpoint: little, and what grows with their number goes to rank 0 alone.

Of `ranks` and `nodes`, what a save costs a rank besides its own bytes is 16 bytes a rank (`place`); rank 0 gets what
all have written (told.py). Every rank takes part in each function unless it says otherwise.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.device import backend

Group = dist.ProcessGroup | None  # None: all ranks, on the device's back end


def from_rank_zero(value: Any, group: Group = None) -> Any:
    """Return `value` of rank 0, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def to_rank_zero(value: Any, group: Group) -> list[Any]:
    """Return `value` of every rank on rank 0, and [] on the others. `group` is that of `control`."""
    parts: list[Any] = [None] * (dist.get_world_size() if dist.get_rank() == 0 else 0)
    dist.gather_object(value, parts or None, dst=0, group=group)
    return parts


@contextlib.contextmanager
def control() -> Iterator[Group]:
    """Yield a group of all ranks for words in host memory.

    NCCL would keep buffers on rank 0's GPU for each rank that ever sent it one. After an exception the group is left
    as it is: destroying it would wait for ranks that do not know.
    """
    if backend() == "gloo":
        yield None
        return
    group = dist.new_group(backend="gloo")
    yield group
    dist.destroy_process_group(group)


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Place:
    """The file that a rank writes into, and the byte where its part begins."""

    file: int
    start: int


@functools.cache
def node() -> int:
    """Return a number that the processes of this node have in common, and no other node's. No communication."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = os.uname().nodename + (boot.read_text() if boot.exists() else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


def place(size: int, group: Group) -> Place:
    """Return where this rank's `size` bytes go: ranks of a node share a file, so that files are as many as nodes.

    Rank 0 has called it only when what it did before is done.
    """
    everyone = torch.empty((dist.get_world_size(), 2), dtype=torch.int64)
    dist.all_gather_into_tensor(everyone, torch.tensor([[node(), size]]), group=group)
    return place_of(dist.get_rank(), *everyone.T.tolist())


def place_of(rank: int, nodes: Sequence[int], sizes: Sequence[int]) -> Place:
    """Return the place of a rank, of ranks on these `nodes` that write so many bytes each. No communication."""
    numbers: dict[int, int] = {}
    for other in nodes[: rank + 1]:
        numbers.setdefault(other, len(numbers))
    return Place(numbers[nodes[rank]], sum(size for other, size in zip(nodes[:rank], sizes) if other == nodes[rank]))
