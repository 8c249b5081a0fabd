"""Which storages are on the pretended GPU, and what made the host wait for it."""

import contextlib
import dataclasses
import sys
import threading
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOT = Path(__file__).parents[3]


class Stray(RuntimeError):
    """Something is on the wrong device, or is used too early."""


@dataclasses.dataclass
class State:
    on_gpu: dict[int, StorageWeakRef] = dataclasses.field(default_factory=dict)
    pinned: dict[int, StorageWeakRef] = dataclasses.field(default_factory=dict)
    copying: dict[int, StorageWeakRef] = dataclasses.field(default_factory=dict)  # host memory that the GPU still uses
    purge_at: int = 4096
    events: Counter = dataclasses.field(default_factory=Counter)  # (kind, where) of the main thread
    unordered: Counter = dataclasses.field(default_factory=Counter)  # (operator, where)
    graph: Any = None  # a cuda.CUDAGraph that is being recorded
    groups: dict[str, str] = dataclasses.field(default_factory=dict)  # back end of a process group, by its name


state = State()
local = threading.local()
original: dict[str, Any] = {}  # torch's own functions


# ---------------------------------------------------------------- which memory is where


def key_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def is_in(memory: dict[int, StorageWeakRef], tensor: torch.Tensor) -> bool:
    return key_of(tensor) in memory


def add(memory: dict[int, StorageWeakRef], tensor: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    if storage._cdata not in memory:
        memory[storage._cdata] = StorageWeakRef(storage)  # holds the address, so that no other storage gets it
        if len(state.on_gpu) > state.purge_at:
            for held in (state.on_gpu, state.pinned, state.copying):
                for key in [key for key, reference in held.items() if reference.expired()]:
                    del held[key]
            state.purge_at = 4096 + 2 * len(state.on_gpu)


def is_on_gpu(tensor: torch.Tensor) -> bool:
    return is_in(state.on_gpu, tensor)


def where(skip: int = 2) -> str:
    """Return file:line of the innermost frame of the project or megatron-core, tests aside."""
    frame: types.FrameType | None = sys._getframe(skip)
    found = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "megatron" in name:
            short = name.split("site-packages/")[-1].removeprefix(f"{ROOT}/")
            found = found or f"{short}:{frame.f_lineno}"
            if short.startswith("megatron_ext"):
                return found if found.startswith(short) else f"{found} < {short}:{frame.f_lineno}"
        frame = frame.f_back
    return found or "elsewhere"


def _is_of_gloo() -> bool:
    """Return whether gloo copies results of coalesced collectives back, which NCCL has in their places."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and Path(frame.f_code.co_filename).parent.name == "pretended":
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_coalescing_manager"


def event(kind: str) -> None:
    """Count that the host waits, and what it waited for as done."""
    if state.graph is not None:
        raise Stray(f"{kind}: operation not permitted when stream is capturing ({where(3)})")
    if threading.current_thread() is threading.main_thread() and not _is_of_gloo():
        state.events[kind, where(3)] += 1
    if kind != "send":
        state.copying.clear()


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Let operators through, of this thread."""
    before, local.unseen = getattr(local, "unseen", False), True
    try:
        yield
    finally:
        local.unseen = before


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Give the events of the block, by kind and place, when it ends."""
    before, found = Counter(state.events), Counter()
    yield found
    found.update(state.events - before)


def kinds(found: Counter) -> dict[str, int]:
    total: Counter = Counter()
    for (kind, _), count in found.items():
        total[kind] += count
    return dict(total)


def unordered() -> Counter:
    return Counter(state.unordered)
