"""Operators and methods of tensors on the pretended GPU."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.gpu_rehearsal.pretended.memory import (
    CPU,
    GPU,
    Stray,
    add,
    event,
    is_in,
    is_on_gpu,
    local,
    original,
    state,
    unseen,
    where,
)

aten = torch.ops.aten
_device = torch.device
READS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
FILLING = {aten.fill_.Tensor, aten.fill.Tensor, aten.masked_fill_.Tensor, aten.masked_fill.Tensor}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
# Of what torch.use_deterministic_algorithms names, that which may be met here.
UNORDERED = {"index_add_", "index_add", "scatter_add_", "scatter_add", "put_", "cumsum", "bincount", "index_reduce"}


# ---------------------------------------------------------------- operators


def _strays(func: Any, tensors: list[torch.Tensor], on_gpu: list[bool]) -> list[torch.Tensor]:
    """Return the CPU tensors that may not meet those on the GPU."""
    scalars = torch.Tag.pointwise in func.tags or "_foreach" in func.name() or func in INDEXING | FILLING
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
            wanted = state.groups.get(name, "gloo") == "nccl"
            wrong = [list(tensor.shape) for tensor in tensors if is_on_gpu(tensor) != wanted]
            if wrong:
                raise Stray(f"{func} over {'nccl' if wanted else 'gloo'} of tensors {wrong} that lie elsewhere")


def _is_for_gpu(func: Any, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> bool:
    """Return whether an operator on `tensors` runs on the GPU. Raises Stray where it could not run at all."""
    on_gpu = [is_on_gpu(tensor) for tensor in tensors]
    if func.namespace == "c10d":
        if func.name() != "c10d::barrier":
            _check_collective(func, args, tensors)
        return any(on_gpu)
    if any(is_in(state.copying, tensor) for tensor in tensors):
        raise Stray(f"{func} uses host memory that the GPU is still copying ({where(3)})")
    if func is aten.copy_.default:
        if on_gpu[0] != on_gpu[1]:
            _copied(args[0], args[1], bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking")))
        return on_gpu[0]
    if any(on_gpu) and (strays := _strays(func, tensors, on_gpu)):
        shapes = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in strays]
        raise Stray(f"{func} finds CPU tensors {shapes} among those of cuda:0 ({where(3)})")
    return any(on_gpu)


def _is_unordered(func: Any, args: tuple) -> bool:
    """Return whether a GPU adds up in another order at each run."""
    name = func.name().split("::")[1].split(".")[0]
    if func in INDEXING:
        return len(args) > 3 and bool(args[3])  # accumulates
    return name in UNORDERED and (name != "cumsum" or args[0].is_floating_point())


class Discipline(TorchDispatchMode):
    """Sees every operator of a thread, those of backward included."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch._dynamo

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(local, "unseen", False):
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        tensors = [tensor for tensor in tensors if original["device"].__get__(tensor) == CPU]  # meta is nobody's matter
        target = getattr(local, "target", False)
        if isinstance(named := kwargs.get("device"), _device) and named.type == "cuda":  # from `with torch.device(...)`
            kwargs, target = {**kwargs, "device": CPU}, True
        gpu = _is_for_gpu(func, args, kwargs, tensors) if tensors else target
        if gpu and _makes_host_wait(func, args):
            event("read")
        out = self._run(func, args, kwargs, gpu)
        if gpu and func is not aten._local_scalar_dense.default:
            outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            for tensor in outs:
                add(state.on_gpu, tensor)
            if _is_unordered(func, args):
                state.unordered[str(func), where()] += 1
            if state.graph is not None:
                state.graph.note(func, args, kwargs, outs)
        return out

    def _run(self, func: Any, args: tuple, kwargs: dict, gpu: bool) -> Any:
        if not (gpu and torch.Tag.nondeterministic_seeded in func.tags):
            return func(*args, **kwargs)
        host, own = torch.get_rng_state(), torch.cuda.default_generators[0]  # the GPU has a generator of its own
        torch.set_rng_state(torch.Generator.get_state(own))  # also in a recording, which may draw
        try:
            return func(*args, **kwargs)
        finally:
            torch.Generator.set_state(own, torch.get_rng_state())
            torch.set_rng_state(host)


def _copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
    """Hear that numbers go from one device to the other."""
    host = source if is_on_gpu(target) else target
    if non_blocking and is_in(state.pinned, host):
        if state.graph is not None:
            raise Stray(f"a copy from or to the host is recorded ({where(3)})")
        add(state.copying, host)
    elif is_on_gpu(target):
        if not non_blocking:  # from pageable memory the driver stages it, and nobody waits for the GPU
            event("send")
    else:
        event("read")


class _Move(torch.autograd.Function):
    """Copies a tensor to the other device."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gpu: bool, non_blocking: bool) -> torch.Tensor:
        with unseen():
            out = original["clone"](x.detach())
        if gpu:
            add(state.on_gpu, out)
            _copied(out, x, non_blocking)
            return out
        if non_blocking:
            add(state.pinned, out)  # torch's own choice for such a copy
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
        return original["to"](self, device)
    named = {} if layout is None else {"memory_format": layout}
    if device is None or (device.type == "cuda") == is_on_gpu(self):
        return original["to"](self, dtype or self.dtype, copy=copy, **named)
    return original["to"](_Move.apply(self, device.type == "cuda", non_blocking), dtype or self.dtype, **named)


def _without_device(plain: Callable) -> Callable:
    """Return a function that makes tensors, which pretends to make them on its `device`."""

    @functools.wraps(plain)
    def made(*args: Any, **kwargs: Any) -> Any:
        like = args[0] if args and isinstance(args[0], torch.Tensor) else None
        named = kwargs.pop("device", None)
        if isinstance(named, torch.device | str) and torch.device(named).type == "meta":
            return plain(*args, **{**kwargs, "device": named})
        pinned = kwargs.pop("pin_memory", False)
        copies = plain.__name__ in ("tensor", "as_tensor", "asarray", "new_tensor")
        given = like is not None and is_on_gpu(like)
        gpu = _names_gpu(named) if named is not None else given
        before, local.target = getattr(local, "target", False), gpu
        try:
            if copies or (like is not None and given != gpu):
                with unseen():
                    out = plain(*args, **kwargs)
            else:
                out = plain(*args, **kwargs)
        finally:
            local.target = before
        if copies:
            for leaf in tree_leaves(args[like is not None :]):  # numbers are taken out of each by itself
                if isinstance(leaf, torch.Tensor) and is_on_gpu(leaf):
                    event("read")
        if gpu:
            add(state.on_gpu, out)
            if copies and (not given or plain.__name__ == "new_tensor"):
                event("send")
        if pinned:
            add(state.pinned, out)
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
        event("read")
    return original["tolist"](self)


def _type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or not is_on_gpu(self):
        return original["type"](self, *args, **kwargs)
    return original["type"](self).replace("torch.", "torch.cuda.")


def _pin_memory(self: torch.Tensor, *_: Any) -> torch.Tensor:
    if is_on_gpu(self):
        raise Stray("cannot pin 'torch.cuda.FloatTensor', only dense CPU tensors can be pinned")
    out = self.clone()
    add(state.pinned, out)
    return out


def _deepcopy(self: torch.Tensor, memo: Any) -> torch.Tensor:
    out = original["__deepcopy__"](self, memo)
    if is_on_gpu(self):
        add(state.on_gpu, out)
    return out


class _KindOfDevice(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _device("cuda", args[0]) if args and type(args[0]) is int else _device(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _device)


class _Device(metaclass=_KindOfDevice):
    """torch.device, of which a number alone is a GPU's."""


def pretend_tensors() -> None:
    tensor = torch.Tensor
    for name in ("to", "clone", "tolist", "type", "__deepcopy__"):
        original[name] = getattr(tensor, name)
    original["device"] = torch._C.TensorBase.device
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
        own = original["device"].__get__(self)
        is_plain = type(self) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        return GPU if is_plain and own == CPU and is_on_gpu(self) else own

    torch.device = _Device  # type: ignore[assignment, misc]
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
        "is_pinned": lambda self, *_: is_in(state.pinned, self),
        "record_stream": lambda self, stream: None,
        "__deepcopy__": _deepcopy,
    }
    for name, value in changed.items():
        setattr(tensor, name, value)
