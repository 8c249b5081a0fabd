"""CPU or GPU: decided here, and the only file that changes megatron-core.

`init_device()` picks the GPU of this rank, or makes megatron-core 0.16.1 run on a CPU build of torch:

* the functions of PATCHES, each with the reason, before megatron-core is imported (some it takes at import);
* one TorchFunctionMode that reads the literal "cuda" in megatron-core's calls as "cpu".

On a machine with CUDA nothing is patched but, where Transformer Engine is not installed, the router that needs it.
Everything else in the package asks `device()` and `backend()`, or is a layer spec or a kernel.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

MEGATRON_CORE = "0.16.1"
CPU = torch.device("cpu")

_ready = False
_mode: "LiteralCudaIsCpu | None" = None
_originals: dict[str, Any] = {}


class Patch(NamedTuple):
    """One name of torch or megatron-core that gets another meaning on CPU."""

    why: str
    replacement: Callable[[], Any]


def _cpu_device() -> torch.device:
    return CPU


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _current_stream(*_: Any) -> "CpuStream":
    return CpuStream()


def _seed(seed: int) -> None:
    torch.manual_seed(seed)


class FusedAdam(torch.optim.Optimizer):
    """Adam with the state layout of Apex's and Transformer Engine's FusedAdam: the step count sits in the group.

    mcore's distributed optimizer cannot load a checkpoint of torch.optim.AdamW (it looks for group["step"]:
    optimizer/distrib_optimizer.py:641,940). With this class it can, and CPU and GPU checkpoints have one format.
    The update is AdamW (Loshchilov & Hutter, arXiv 1711.05101) with decoupled decay, or Adam with L2 where
    `adam_w_mode` is off.
    """

    # As torch wraps them, they would import torch._dynamo: half a second of each rank's start.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **unsupported: Any,
    ):
        if unsupported:
            raise NotImplementedError(f"FusedAdam on CPU has no {sorted(unsupported)}")
        super().__init__(
            params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        )
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # None; torch's own gives what a closure returns
        with plain_torch():
            self._step()

    def _step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["params"]:
                continue
            # The count advances on a rank without gradients too: all ranks must save the same groups.
            group["step"] = group.get("step", 0) + 1
            if not params:
                continue
            beta1, beta2 = group["betas"]
            correction1 = correction2 = 1.0
            if group["bias_correction"]:
                correction1, correction2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            grads = [p.grad for p in params]
            first = [self.state[p]["exp_avg"] for p in params]
            second = [self.state[p]["exp_avg_sq"] for p in params]
            if group["weight_decay"]:
                if self.adam_w_mode:
                    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                else:
                    grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            root = torch._foreach_sqrt(second)
            torch._foreach_div_(root, correction2**0.5)
            torch._foreach_add_(root, group["eps"])
            torch._foreach_addcdiv_(params, first, root, -group["lr"] / correction1)


class CpuStream:
    """A stream of work on a device that runs everything at once; also an event on it."""

    def record_event(self) -> "CpuStream":
        return self

    def synchronize(self) -> None:
        pass

    def wait_stream(self, other: "CpuStream") -> None:
        pass


def _router_gating_linear(
    inp: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, router_dtype: torch.dtype
) -> torch.Tensor:
    bias = None if bias is None else bias.to(router_dtype)
    return torch.nn.functional.linear(inp.to(router_dtype), weight.to(router_dtype), bias)


def _widened(path: str) -> Callable[..., torch.Tensor]:
    """Return mcore's linear layer `path`, made to take bfloat16 as fp32 where the CPU has no instructions for it."""
    linear = original(path)

    @functools.wraps(linear)  # with its attributes, which it looks for under its name
    def widened(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any, **named: Any
    ) -> torch.Tensor:
        if input.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return linear(input, weight, bias, *args, **named)
        bias = None if bias is None else bias.float()
        return linear(input.float(), weight.float(), bias, *args, **named).to(input.dtype)

    return widened


def _to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return _uncompiled if function is None else function


_ROUTER = "megatron.core.transformer.moe.router.router_gating_linear"
_LINEAR = "megatron.core.tensor_parallel.layers.linear_with_"
_SLOW_BF16 = "without AVX-512 torch multiplies bfloat16 row by row: from 16 rows on 2 to 8 times as slow as widened"

PATCHES: dict[str, Patch] = {
    "torch.compile": Patch(
        "mcore's @jit_fuser: each use compiles for seconds on CPU, and the mere decorator imports torch._dynamo",
        lambda: _uncompiled,
    ),
    "torch.cuda.current_device": Patch(
        "the device of every buffer mcore makes (DDP buffers, rotary frequencies, mask-free paths)",
        lambda: _cpu_device,
    ),
    "torch.cuda.get_rng_state": Patch("RNG tracker reads the default generator (random.py)", lambda: _rng_state),
    "torch.cuda.manual_seed": Patch("RNG tracker seeds the default generator (random.py)", lambda: _seed),
    "torch.cuda.random.get_rng_state": Patch("same function by its other name", lambda: _rng_state),
    "torch.cuda.synchronize": Patch(
        "pipeline send/receive and every checkpoint save wait for the device", lambda: _nothing
    ),
    "torch.cuda.Stream": Patch("the alltoall dispatcher copies its counts on a side stream", lambda: CpuStream),
    "torch.cuda.current_stream": Patch("the same", lambda: _current_stream),
    "torch.cuda.stream": Patch("the same", lambda: contextlib.nullcontext),
    _ROUTER: Patch(  # on a GPU without Transformer Engine too
        "the original asks for te_general_gemm, a name that only exists with Transformer Engine (moe_utils.py:1192)",
        lambda: _router_gating_linear,
    ),
    **{
        f"{_LINEAR}{name}": Patch(_SLOW_BF16, functools.partial(_widened, f"{_LINEAR}{name}"))
        for name in ("frozen_weight", "grad_accumulation_and_async_allreduce")
    },
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": Patch(
        "the original leaves CPU tensors alone, where all_to_all needs split sizes as numbers (moe_utils.py:1087)",
        lambda: _to_cpu,
    ),
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": Patch(
        "the original queues a callback for CUDA's lazy start and returns nothing", lambda: _rng_state
    ),
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": Patch(
        "the original queues a callback for CUDA's lazy start for ever", lambda: _set_rng_state
    ),
    "megatron.core.optimizer.Adam": Patch(
        "torch.optim.AdamW, the fall-back, has a state that the distributed optimizer cannot load", lambda: FusedAdam
    ),
    "megatron.core.optimizer.distrib_optimizer.Adam": Patch(
        "the distributed optimizer accepts this class only (distrib_optimizer.py:514)", lambda: FusedAdam
    ),
    "megatron.core.optimizer.USING_PYTORCH_OPTIMIZER": Patch("makes mcore build the Adam above", lambda: False),
    "megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE": Patch(
        "distributed optimizer reads and writes the step of FusedAdam groups", lambda: True
    ),
    "megatron.core.optimizer.distrib_optimizer.USING_APEX_OPTIMIZER": Patch(
        "FusedAdam above keeps the step where Apex keeps it", lambda: True
    ),
}


def _resolve(path: str) -> tuple[Any, str]:
    """Return the module that holds the dotted name, and the name in it."""
    module, name = path.rsplit(".", 1)
    return importlib.import_module(module), name


def original(path: str) -> Any:
    """Return what the patched name was before `init_device` (the name itself where nothing was patched)."""
    if path in _originals:
        return _originals[path]
    return getattr(*_resolve(path))


def _is_cuda(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


class LiteralCudaIsCpu(TorchFunctionMode):
    """Reads device="cuda", .cuda(), .to("cuda") and pin_memory=True as the CPU, and Tensor.type() as on a GPU.

    Sites: schedules.py:596, optimizer.py:481-907, clip_grads.py:103-174, distrib_optimizer.py:361-582 and others.
    It is not active inside backward or in other threads: nothing in a layer's forward may depend on it, or
    recomputation would fail.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func in _METHODS:
            if func is torch.Tensor.type:
                if len(args) == 1 and not kwargs:
                    return func(args[0]).replace("torch.", "torch.cuda.")
            elif func is torch.Tensor.to:
                args = tuple(CPU if _is_cuda(value) else value for value in args)
            else:
                return args[0]
        return func(*args, **kwargs) if kwargs else func(*args)


_METHODS = {torch.Tensor.type, torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.pin_memory}


def _without_rng_noise(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


# Warnings of torch 2.13 about megatron-core's calls, and its own about missing extras: nothing a user can act on.
NOISE = (
    r".*(Apex|Transformer Engine).* (is|are) not installed",
    r"full scope is deprecated",
    r"(?s).*transformer_engine.*module is deprecated",
    r"MLP requires ffn_hidden_size",
    r"`torch\.distributed\.\w+` is deprecated",
    r"`?(load_state_dict|torch\.distributed\._\w+)`? is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    r"TypedStorage is deprecated",
    r"Please use DTensor instead",
)


def check_version() -> None:
    """Raise RuntimeError unless the one megatron-core that was measured is installed."""
    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        installed = "none"
    if installed != MEGATRON_CORE:
        raise RuntimeError(
            f"megatron-core {installed} is installed, but megatron_ext/device.py is written for {MEGATRON_CORE}: "
            f"pip install megatron-core=={MEGATRON_CORE}"
        )


def _patch(patches: Mapping[str, Patch]) -> None:
    for path, patch in patches.items():
        module, name = _resolve(path)
        if not hasattr(module, name):
            raise RuntimeError(f"{path} does not exist in megatron-core {MEGATRON_CORE} with torch {torch.__version__}")
        _originals[path] = getattr(module, name)
        setattr(module, name, patch.replacement())


@contextlib.contextmanager
def _without_wandb() -> Iterator[None]:
    """Spare each rank a second: mcore's own inference engine, which nothing here uses, would import wandb."""
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]  # reads as not installed
    try:
        yield
    finally:
        del sys.modules["wandb"]


def init_device() -> None:
    """Prepare this process for megatron-core, once; later calls do nothing.

    Raises RuntimeError when megatron-core has another version, or was imported on a CPU machine before this call
    (its functions are then already wrapped by torch.compile).
    """
    global _ready, _mode
    if _ready:
        return
    check_version()
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        with _without_wandb():
            importlib.import_module("megatron.core")
            if importlib.util.find_spec("transformer_engine") is None:
                _patch({_ROUTER: PATCHES[_ROUTER]})
        _ready = True
        return
    if "megatron.core.jit" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before init_device(): on CPU its functions are now compiled at first use. "
            "Call megatron_ext.device.init_device() first"
        )
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # mcore warns where tensor parallelism lacks it
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_without_rng_noise)
    with _without_wandb():
        _patch(PATCHES)
    _mode = LiteralCudaIsCpu()
    _mode.__enter__()
    torch.set_num_threads(1)  # so that sums agree whatever the machine
    _ready = True


def plain_torch() -> contextlib.AbstractContextManager[Any]:
    """Return a block for calls of our own layers, which name no literal "cuda": torch functions skip the mode in it."""
    return torch.overrides._pop_mode_temporarily() if _mode is not None else contextlib.nullcontext()


def is_cpu() -> bool:
    """Return whether this rank computes on a CPU: for layer specs and kernels only; everybody else asks `device()`."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """Return the device on which this rank's tensors live."""
    return CPU if is_cpu() else torch.device("cuda", torch.cuda.current_device())


def backend() -> str:
    """Return the torch.distributed back end of that device."""
    return "gloo" if is_cpu() else "nccl"


def record(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return `run` as one CUDA graph, which reads what it reads and gives the same tensor; on CPU `run` itself."""
    if is_cpu():
        return run
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries set themselves up in their first calls, which no graph can hold
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return kept

    return replay


# ---------------------------------------------------------------- what it has been doing


def mark() -> Any:
    """Return a mark of now on the clock of the device's work, for `seconds_between`."""
    if is_cpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Any, last: Any) -> float:
    """Return the seconds from one mark to a later one. Waits until the device has come there."""
    if is_cpu():
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1000


def peak_memory() -> int:
    """Return the bytes that this rank has held at most: allocated on its GPU, or resident on a machine without."""
    if is_cpu():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    return torch.cuda.max_memory_allocated()


def machine() -> dict[str, Any]:
    """Return name, compute capability and cuDNN (91002 is 9.10.2) of this rank's GPU; {} without one."""
    gpu, cudnn = torch.cuda, torch.backends.cudnn.version
    return {} if is_cpu() else dict(gpu=gpu.get_device_name(), capability=gpu.get_device_capability(), cudnn=cudnn())
