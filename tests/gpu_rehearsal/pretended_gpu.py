"""A pretended GPU: `begin` makes this process believe in one, and every tensor has the device that it would have there.

The numbers lie in host memory and are computed by the CPU's kernels; what is kept beside them is which storages are
"on the GPU". So device.py takes its way of a machine with CUDA, megatron-core is not patched, and whatever leaves a
tensor behind raises, at the operator that meets it:

* an operator whose tensors lie on two devices. CUDA lets a CPU tensor without dimensions into pointwise operators, and
  so does this. It also copies a CPU tensor of indices or a mask at each use: here that raises.
* numpy on a GPU's tensor; a collective of "nccl" over CPU tensors, or of gloo over a GPU's.
* a copy with non_blocking between pinned memory and the GPU whose memory an operator uses before anybody waited for it.
* between `torch.cuda.graph` and its end: whatever makes the host wait. A replay runs the same kernels on the same
  memory again, and raises where memory of before the recording was given back.

`events` counts what makes the host wait for the GPU: "read" (numbers come to the host: item, tolist, .cpu(), nonzero),
"send" (numbers go to the GPU from memory that is not pinned, or without non_blocking), "wait" (synchronize).

Not pretended: the order of streams, memory and its end, other kernels' rounding, more than one GPU a process.
"""

import contextlib
import dataclasses
import functools
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOT = Path(__file__).parents[2]
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default,
    aten.repeat_interleave.Tensor, aten.is_pinned.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
# Of what torch.use_deterministic_algorithms names, that which may be met here.
UNORDERED = {"index_add_", "index_add", "scatter_add_", "scatter_add", "put_", "cumsum", "bincount", "index_reduce"}


class Stray(RuntimeError):
    """Something is on the wrong device, or is used too early."""


@dataclasses.dataclass
class _State:
    on_gpu: dict[int, StorageWeakRef] = dataclasses.field(default_factory=dict)
    pinned: dict[int, StorageWeakRef] = dataclasses.field(default_factory=dict)
    copying: dict[int, StorageWeakRef] = dataclasses.field(default_factory=dict)  # host memory that the GPU still uses
    purge_at: int = 4096
    events: Counter = dataclasses.field(default_factory=Counter)  # (kind, where) of the main thread
    unordered: Counter = dataclasses.field(default_factory=Counter)  # (operator, where)
    graph: "CUDAGraph | None" = None  # that is being recorded
    groups: dict[str, str] = dataclasses.field(default_factory=dict)  # back end of a process group, by its name


_state = _State()
_local = threading.local()
_plain: dict[str, Any] = {}  # torch's own functions


# ---------------------------------------------------------------- which memory is where


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_in(memory: dict[int, StorageWeakRef], tensor: torch.Tensor) -> bool:
    return _key(tensor) in memory


def _add(memory: dict[int, StorageWeakRef], tensor: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    if storage._cdata not in memory:
        memory[storage._cdata] = StorageWeakRef(storage)  # holds the address, so that no other storage gets it
        if len(_state.on_gpu) > _state.purge_at:
            for held in (_state.on_gpu, _state.pinned, _state.copying):
                for key in [key for key, reference in held.items() if reference.expired()]:
                    del held[key]
            _state.purge_at = 4096 + 2 * len(_state.on_gpu)


def is_on_gpu(tensor: torch.Tensor) -> bool:
    return _is_in(_state.on_gpu, tensor)


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


def _event(kind: str) -> None:
    """Count that the host waits, and what it waited for as done."""
    if _state.graph is not None:
        raise Stray(f"{kind}: operation not permitted when stream is capturing ({where(3)})")
    if threading.current_thread() is threading.main_thread():
        _state.events[kind, where(3)] += 1
    if kind != "send":
        _state.copying.clear()


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Let operators through, of this thread."""
    before, _local.unseen = getattr(_local, "unseen", False), True
    try:
        yield
    finally:
        _local.unseen = before


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Give the events of the block, by kind and place, when it ends."""
    before, found = Counter(_state.events), Counter()
    yield found
    found.update(_state.events - before)


def kinds(found: Counter) -> dict[str, int]:
    total: Counter = Counter()
    for (kind, _), count in found.items():
        total[kind] += count
    return dict(total)


def unordered() -> Counter:
    return Counter(_state.unordered)


# ---------------------------------------------------------------- operators


def _strays(func: Any, tensors: list[torch.Tensor], on_gpu: list[bool]) -> list[torch.Tensor]:
    """Return the CPU tensors that may not meet those on the GPU."""
    scalars = torch.Tag.pointwise in func.tags or "_foreach" in func.name() or func in INDEXING
    return [tensor for tensor, gpu in zip(tensors, on_gpu) if not gpu and not (scalars and tensor.dim() == 0)]


def _is_mask(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.bool, torch.uint8)


def _makes_host_wait(func: Any, args: tuple) -> bool:
    if func in READS:
        return True
    if func not in INDEXING or not any(map(_is_mask, args[1])):
        return False
    alone = sum(index is not None for index in args[1]) == 1
    return not (func != aten.index.Tensor and alone and args[2].numel() == 1)  # becomes masked_fill


def _check_collective(func: Any, args: tuple, tensors: list[torch.Tensor]) -> None:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            name = dist.ProcessGroup.unbox(arg).group_name
            wanted = _state.groups.get(name, "gloo") == "nccl"
            wrong = [list(tensor.shape) for tensor in tensors if is_on_gpu(tensor) != wanted]
            if wrong:
                raise Stray(f"{func} over {'nccl' if wanted else 'gloo'} of tensors {wrong} that lie elsewhere")


class _Discipline(TorchDispatchMode):
    """Sees every operator of a thread, those of backward included."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch._dynamo

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(_local, "unseen", False):
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        tensors = [tensor for tensor in tensors if _plain["device"].__get__(tensor) == CPU]  # meta is nobody's matter
        on_gpu = [is_on_gpu(tensor) for tensor in tensors]
        gpu = any(on_gpu) or (not tensors and getattr(_local, "target", False))
        if _state.copying and func.namespace != "c10d":
            for tensor in tensors:
                if _is_in(_state.copying, tensor):
                    raise Stray(f"{func} uses host memory that the GPU is still copying ({where()})")
        if func.namespace == "c10d":
            if func.name() != "c10d::barrier":
                _check_collective(func, args, tensors)
        elif func is aten.copy_.default:
            gpu = on_gpu[0]
            if on_gpu[0] != on_gpu[1]:
                _copied(args[0], args[1], bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking")))
        elif gpu and not all(on_gpu):
            strays = _strays(func, tensors, on_gpu)
            if strays:
                shapes = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in strays]
                raise Stray(f"{func} finds CPU tensors {shapes} among those of cuda:0 ({where()})")
        if gpu and _makes_host_wait(func, args):
            _event("read")
        out = self._run(func, args, kwargs, gpu)
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if gpu and func is not aten._local_scalar_dense.default:
            for tensor in outs:
                _add(_state.on_gpu, tensor)
            if func.name().split("::")[1].split(".")[0] in UNORDERED and not (
                "cumsum" in func.name() and not tensors[0].is_floating_point()
            ):
                _state.unordered[str(func), where()] += 1
            elif func in INDEXING and len(args) > 3 and args[3]:
                _state.unordered[f"{func} (accumulate)", where()] += 1
        if _state.graph is not None and gpu:
            _state.graph.note(func, args, kwargs, outs)
        return out

    def _run(self, func: Any, args: tuple, kwargs: dict, gpu: bool) -> Any:
        if not (gpu and torch.Tag.nondeterministic_seeded in func.tags):
            return func(*args, **kwargs)
        host, own = torch.get_rng_state(), torch.cuda.default_generators[0]  # the GPU has a generator of its own
        torch.set_rng_state(own.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            own.set_state(torch.get_rng_state())
            torch.set_rng_state(host)


def _copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
    """Hear that numbers go from one device to the other."""
    host = source if is_on_gpu(target) else target
    if non_blocking and _is_in(_state.pinned, host):
        if _state.graph is not None:
            raise Stray(f"a copy from or to the host is recorded ({where(3)})")
        _add(_state.copying, host)
    elif is_on_gpu(target):
        if not non_blocking:  # from pageable memory the driver stages it, and nobody waits for the GPU
            _event("send")
    else:
        _event("read")


class _Move(torch.autograd.Function):
    """Copies a tensor to the other device."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gpu: bool, non_blocking: bool) -> torch.Tensor:
        with _unseen():
            out = _plain["clone"](x.detach())
        if gpu:
            _add(_state.on_gpu, out)
            _copied(out, x, non_blocking)
            return out
        if non_blocking:
            _add(_state.pinned, out)  # torch's own choice for such a copy
        _copied(out, x, non_blocking)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _Move.apply(grad, not is_on_gpu(grad), False), None, None


# ---------------------------------------------------------------- what names a device


def _names_gpu(device: Any) -> bool:
    if device is None:
        return False
    return isinstance(device, int) or torch.device(device).type == "cuda"


def _to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    copy = kwargs.pop("copy", False)
    other = kwargs.pop("other", args[0] if args and isinstance(args[0], torch.Tensor) else None)
    if other is not None:
        device, dtype = other.device, other.dtype
        flags = dict(zip(("non_blocking", "copy"), args[1:]), **kwargs)
        non_blocking, copy, layout = flags.get("non_blocking", False), flags.get("copy", copy), None
    else:
        if args and type(args[0]) is int:
            args = (GPU, *args[1:])
        if type(kwargs.get("device")) is int:
            kwargs["device"] = GPU
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type not in ("cuda", "cpu"):
        return _plain["to"](self, device)
    named = {} if layout is None else {"memory_format": layout}
    if device is None or (device.type == "cuda") == is_on_gpu(self):
        return _plain["to"](self, dtype or self.dtype, copy=copy, **named)
    return _plain["to"](_Move.apply(self, device.type == "cuda", non_blocking), dtype or self.dtype, **named)


def _without_device(plain: Callable) -> Callable:
    """Return a function that makes tensors, which pretends to make them on its `device`."""

    @functools.wraps(plain)
    def made(*args: Any, **kwargs: Any) -> Any:
        like = args[0] if args and isinstance(args[0], torch.Tensor) else None
        named = kwargs.pop("device", None)
        if isinstance(named, torch.device | str) and torch.device(named).type == "meta":
            return plain(*args, **kwargs, device=named)
        pinned = kwargs.pop("pin_memory", False)
        is_copy = plain in (_plain["tensor"], _plain["as_tensor"], _plain["asarray"], _plain["new_tensor"])
        given = is_on_gpu(like) if like is not None and plain is not _plain["new_tensor"] else False
        gpu = _names_gpu(named) if named is not None else (given or (plain is _plain["new_tensor"] and is_on_gpu(like)))
        before, _local.target = getattr(_local, "target", False), gpu
        try:
            if is_copy or (like is not None and given != gpu):
                with _unseen():
                    out = plain(*args, **kwargs)
            else:
                out = plain(*args, **kwargs)
        finally:
            _local.target = before
        if gpu:
            _add(_state.on_gpu, out)
            if is_copy and not given:
                _event("send")
        if pinned:
            _add(_state.pinned, out)
        return out

    return made


def _on_host_only(name: str) -> Callable:
    plain = getattr(torch.Tensor, name)

    @functools.wraps(plain)
    def checked(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_on_gpu(self):
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy ({where()})")
        return plain(self, *args, **kwargs)

    return checked


def _tolist(self: torch.Tensor) -> Any:
    if is_on_gpu(self):
        _event("read")
    return _plain["tolist"](self)


def _type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or not is_on_gpu(self):
        return _plain["type"](self, *args, **kwargs)
    return _plain["type"](self).replace("torch.", "torch.cuda.")


def _pin_memory(self: torch.Tensor, *_: Any) -> torch.Tensor:
    if is_on_gpu(self):
        raise Stray("cannot pin 'torch.cuda.FloatTensor', only dense CPU tensors can be pinned")
    out = self.clone()
    _add(_state.pinned, out)
    return out


def _deepcopy(self: torch.Tensor, memo: Any) -> torch.Tensor:
    out = _plain["__deepcopy__"](self, memo)
    if is_on_gpu(self):
        _add(_state.on_gpu, out)
    return out


def _pretend_tensors() -> None:
    tensor = torch.Tensor
    for name in ("to", "clone", "tolist", "type", "__deepcopy__", "new_tensor"):
        _plain[name] = getattr(tensor, name)
    _plain["device"] = torch._C.TensorBase.device
    for name in ("tensor", "as_tensor", "asarray"):
        _plain[name] = getattr(torch, name)
    for plain in _device_constructors():
        if getattr(torch, plain.__name__, None) is plain:
            setattr(torch, plain.__name__, _without_device(plain))
    for name in ("empty", "zeros", "ones", "full", "rand", "randn", "randint"):
        setattr(torch, f"{name}_like", _without_device(getattr(torch, f"{name}_like")))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided"):
        setattr(tensor, name, _without_device(getattr(tensor, name)))
    for name in ("numpy", "__array__"):
        setattr(tensor, name, _on_host_only(name))

    def device_of(self: torch.Tensor) -> torch.device:
        own = _plain["device"].__get__(self)
        return GPU if own == CPU and is_on_gpu(self) else own

    changed: dict[str, Any] = {
        "device": property(device_of),
        "is_cuda": property(lambda self: self.device.type == "cuda"),
        "is_cpu": property(lambda self: self.device.type == "cpu"),
        "get_device": lambda self: 0 if is_on_gpu(self) else -1,
        "to": _to,
        "cuda": lambda self, device=None, non_blocking=False, **_: self.to(GPU, non_blocking=non_blocking),
        "cpu": lambda self, **_: self.to(CPU),
        "tolist": _tolist,
        "type": _type,
        "pin_memory": _pin_memory,
        "is_pinned": lambda self, *_: _is_in(_state.pinned, self),
        "record_stream": lambda self, stream: None,
        "__deepcopy__": _deepcopy,
    }
    for name, value in changed.items():
        setattr(tensor, name, value)


# ---------------------------------------------------------------- torch.cuda


class Stream:
    """A stream, or an event on it: all that was asked for is done already."""

    def __init__(self, *_: Any, **__: Any):
        self.cuda_stream = id(self)

    def synchronize(self) -> None:
        _event("wait")

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
        inputs = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        held_args, held_kwargs = tree_map_only(torch.Tensor, self._hold, (args, kwargs))
        made: list[Any] = []
        for out in outs:
            fresh = _key(out) not in inputs
            made.append(out if fresh else None)
            if fresh:
                self.own.add(_key(out))
                self._kept.append(out)
        self.steps.append((func, held_args, held_kwargs, made))

    def _hold(self, tensor: torch.Tensor) -> Any:
        if _key(tensor) in self.own or not is_on_gpu(tensor):
            return _Held(tensor, None)
        shape = tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype
        return _Held(None, (StorageWeakRef(tensor.untyped_storage()), *shape))

    def replay(self) -> None:
        with _unseen(), torch.no_grad():
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
    _event("wait")
    _state.graph = cuda_graph
    try:
        yield
    finally:
        _state.graph = None


def _pretend_cuda(devices: int, name: str, capability: tuple[int, int]) -> None:
    cuda: Any = torch.cuda
    stream = Stream()
    properties = types.SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], total_memory=80 << 30, multi_processor_count=132
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
        "synchronize": lambda device=None: _event("wait"),
        "Stream": Stream,
        "Event": Stream,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "is_current_stream_capturing": lambda: _state.graph is not None,
        "default_generators": (torch.Generator(),),
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
        "empty_cache": lambda: None,
    }
    for key, value in changed.items():
        assert hasattr(cuda, key), key
        setattr(cuda, key, value)
    cuda.default_generators[0].manual_seed(1234)

    def uncompiled(function: Any = None, **_: Any) -> Any:
        return uncompiled if function is None else function

    torch.compile = uncompiled  # type: ignore[assignment]  # its kernels are another matter


# ---------------------------------------------------------------- torch.distributed


def _pretend_nccl() -> None:
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
            _state.groups[group.group_name] = name
        return group, store

    def device_of(group: Any = None) -> str:
        group = group or c10d._get_default_group()
        return "cuda" if _state.groups.get(group.group_name) == "nccl" else devices(group)

    def barrier(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        group = kwargs.get("group", args[0] if args else None) or c10d._get_default_group()
        if _state.groups.get(group.group_name) == "nccl":
            _event("wait")
        with _unseen():
            return plain_barrier(*args, **kwargs)

    plain_barrier = c10d.barrier
    c10d._new_process_group_helper, c10d._get_object_coll_device = made, device_of
    c10d.barrier = dist.barrier = barrier


def begin(devices: int = 1, name: str = "NVIDIA H100 80GB HBM3", capability: tuple[int, int] = (9, 0)) -> None:
    """Pretend, from now to this process's end, in all of its threads."""
    _pretend_tensors()
    _pretend_cuda(devices, name, capability)
    _pretend_nccl()
    run = threading.Thread.run

    def disciplined(self: threading.Thread) -> None:
        with _Discipline():
            run(self)

    threading.Thread.run = disciplined  # type: ignore[method-assign]
    _Discipline().__enter__()
