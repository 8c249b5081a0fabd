"""torch.cuda and NCCL, pretended."""

import contextlib
import dataclasses
import os
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.gpu_rehearsal.pretended.memory import (
    Stray,
    event,
    is_on_gpu,
    key_of,
    state,
    unseen,
)

# ---------------------------------------------------------------- torch.cuda


class Stream:
    """A stream, or an event on it: all that was asked for is done already."""

    def __init__(self, *_: Any, **__: Any):
        self.cuda_stream = id(self)

    def synchronize(self) -> None:
        event("wait")

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> "Stream":
        return event or Stream()

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    wait_stream = wait_event = wait

    def elapsed_time(self, other: "Stream") -> float:
        return 1.0


class CUDAGraph:
    """The kernels of a recording, with the memory that they read and write."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.steps: list[tuple[Any, Any, Any, list]] = []
        self.own: set[int] = set()  # storages that were made while it was recorded
        self._kept: list[torch.Tensor] = []

    def note(self, func: Any, args: tuple, kwargs: dict, outs: list[torch.Tensor]) -> None:
        inputs = {key_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        held_args, held_kwargs = tree_map_only(torch.Tensor, self._hold, (args, kwargs))
        made: list[Any] = []
        for out in outs:
            fresh = key_of(out) not in inputs
            made.append(out if fresh else None)
            if fresh:
                self.own.add(key_of(out))
                self._kept.append(out)
        self.steps.append((func, held_args, held_kwargs, made))

    def _hold(self, tensor: torch.Tensor) -> Any:
        if key_of(tensor) in self.own or not is_on_gpu(tensor):
            return _Held(tensor, None)
        shape = tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype
        return _Held(None, (StorageWeakRef(tensor.untyped_storage()), *shape))

    def replay(self) -> None:
        with unseen(), torch.no_grad():
            for func, args, kwargs, made in self.steps:
                args, kwargs = tree_map_only(_Held, _Held.tensor, (args, kwargs))
                outs = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
                for kept, new in zip(made, outs):
                    if kept is not None:
                        kept.copy_(new)

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def reset(self) -> None:
        self.steps.clear()


@dataclasses.dataclass(eq=False)
class _Held:
    """A tensor that a recorded kernel uses: the graph's own, or a place in memory that somebody else has to keep."""

    own: torch.Tensor | None
    outside: tuple | None

    def tensor(self) -> torch.Tensor:
        if self.own is not None:
            return self.own
        reference, shape, stride, offset, dtype = self.outside  # type: ignore[misc]
        if reference.expired():
            raise Stray(f"a recorded kernel reads memory {list(shape)} that was given back")
        storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)


@contextlib.contextmanager
def graph(cuda_graph: CUDAGraph, *_: Any, **__: Any) -> Iterator[None]:
    event("wait")
    state.graph = cuda_graph
    try:
        yield
    finally:
        state.graph = None


class Generator(torch.Generator):
    """A GPU's, whose state is not to be had during a recording (CUDAGeneratorImpl.cpp, assertNotCapturing)."""

    def get_state(self) -> torch.Tensor:
        _not_capturing("current_seed")
        return super().get_state()

    def set_state(self, new_state: torch.Tensor) -> torch.Generator:
        _not_capturing("set_state")
        return super().set_state(new_state)


def _not_capturing(name: str) -> None:
    if state.graph is not None:
        raise Stray(f"Cannot call CUDAGeneratorImpl::{name} during CUDA graph capture")


def pretend_cuda(devices: int, name: str, capability: tuple[int, int]) -> None:
    cuda: Any = torch.cuda
    stream = Stream()
    properties = types.SimpleNamespace(
        name=name,
        uuid=f"GPU-{os.getpid()}",  # one each
        major=capability[0],
        minor=capability[1],
        total_memory=80 << 30,
        multi_processor_count=132,
    )
    changed: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: devices,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: event("wait"),
        "Stream": Stream,
        "Event": Stream,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "is_current_stream_capturing": lambda: state.graph is not None,
        "default_generators": (Generator(),),
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
        "empty_cache": lambda: None,
    }
    for key, value in changed.items():
        assert hasattr(cuda, key), key
        setattr(cuda, key, value)
        if hasattr(cuda.random, key):  # which has names of its own
            setattr(cuda.random, key, value)
    cuda.default_generators[0].manual_seed(1234)
    cuda.nccl.version = lambda: (2, 27, 3)  # torch's own log asks for it

    def uncompiled(function: Any = None, **_: Any) -> Any:
        return uncompiled if function is None else function

    torch.compile = uncompiled  # type: ignore[assignment]  # its kernels are another matter


# ---------------------------------------------------------------- torch.distributed


def pretend_nccl() -> None:
    c10d: Any = dist.distributed_c10d
    helper, devices = c10d._new_process_group_helper, c10d._get_object_coll_device

    def made(size: int, rank: int, ranks: Any, backend: Any, *args: Any, **kwargs: Any) -> Any:
        name = str(backend)
        gloo = c10d.Backend(name.replace("nccl", "gloo"))
        if kwargs.get("device_id") is not None:
            kwargs["device_id"] = None
        group, store = helper(size, rank, ranks, gloo, *args, **kwargs)
        if isinstance(group, dist.ProcessGroup):
            c10d._world.pg_map[group] = (name, c10d._world.pg_map[group][1])
            state.groups[group.group_name] = name
        return group, store

    def device_of(group: Any = None) -> str:
        group = group or c10d._get_default_group()
        return "cuda" if state.groups.get(group.group_name) == "nccl" else devices(group)

    def barrier(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        group = kwargs.get("group", args[0] if args else None) or c10d._get_default_group()
        if state.groups.get(group.group_name) == "nccl":
            event("wait")
        with unseen():
            return plain_barrier(*args, **kwargs)

    plain_barrier = c10d.barrier
    c10d._new_process_group_helper, c10d._get_object_coll_device = made, device_of
    c10d.barrier = dist.barrier = barrier
