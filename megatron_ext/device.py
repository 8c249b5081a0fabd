"""CPU or GPU: decided here, and the only file that changes megatron-core.

`init_device()` picks the GPU of this rank, or makes a megatron-core of versions.py run on a CPU build of torch:

* the functions of PATCHES, each with the reason, before megatron-core is imported (some it takes at import);
* one TorchFunctionMode that reads the literal "cuda" in megatron-core's calls as "cpu";
* where a release imports Triton without asking, that import alone (absent_triton.py).

On a machine with CUDA nothing is patched but the router's product and, where Transformer Engine and Apex are not
installed, the optimizer, whose checkpoints can then be loaded (`WITHOUT_FUSED`).
Everything else in the package asks `device()` and `backend()`, or is a layer spec or a kernel.
"""

import contextlib
import functools
import importlib
import logging
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from data_tools.mistake import UserMistake
from megatron_ext import absent_triton, adam, cpu_linear, versions

CPU = torch.device("cpu")

_ready = False
_mode: "LiteralCudaIsCpu | None" = None
_originals: dict[str, Any] = {}


class NoOwnGpu(UserMistake):
    """A rank has no GPU of its own."""

    of_some_ranks = True  # rank 0 has one


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


class FusedAdam(adam.FusedAdam):
    """Runs as plain torch: it names no literal "cuda"."""

    def step(self, closure: Any = None) -> Any:
        with plain_torch():
            return super().step(closure)


class CpuStream:
    """A stream of work on a device that runs everything at once; also an event on it."""

    def record_event(self) -> "CpuStream":
        return self

    def synchronize(self) -> None:
        pass

    def wait_stream(self, other: "CpuStream") -> None:
        pass


def _linear(path: str) -> Callable[..., torch.Tensor]:
    return cpu_linear.of(original(path))


def _region(path: str) -> Callable[..., torch.Tensor]:
    return cpu_linear.passing(original(path))


def _l2_norm(_size: int, _flag: Any, tensor_lists: Any, *_: Any) -> tuple[torch.Tensor, None]:
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.stack(norms).norm().reshape(1), None


def _to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return _uncompiled if function is None else function


_ROUTER = "megatron.core.transformer.moe.moe_utils.te_general_gemm"  # there with Transformer Engine only
_RANDOM = "megatron.core.tensor_parallel.random"
_LAYERS = "megatron.core.tensor_parallel.layers"
_LINEAR = f"{_LAYERS}.linear_with_"
_LINEAR_WHY = (
    "rollouts multiply few rows by weights that stay (cpu_linear.py); and without AVX-512 torch multiplies bfloat16 "
    "row by row: from 16 rows on 2 to 8 times as slow as widened"
)

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
    _ROUTER: Patch(  # on every GPU
        "the router asks for it, there or not (moe_utils.py:1192). With Transformer Engine from 2.10 on it is None; an "
        "older one would take a bfloat16 bias for the fp32 of its output (cublaslt_gemm.cu tells cuBLAS for fp8 only)",
        lambda: None,
    ),
    **{
        f"{_LINEAR}{name}": Patch(_LINEAR_WHY, functools.partial(_linear, f"{_LINEAR}{name}"))
        for name in ("frozen_weight", "grad_accumulation_and_async_allreduce")
    },
    **{
        f"{_LAYERS}.{name}_tensor_model_parallel_region": Patch(
            "four calls a layer of autograd functions that do nothing for a lone rank: 2% of a decode step",
            functools.partial(_region, f"{_LAYERS}.{name}_tensor_model_parallel_region"),
        )
        for name in ("copy_to", "reduce_from")
    },
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": Patch(
        "the original leaves CPU tensors alone, where all_to_all needs split sizes as numbers (moe_utils.py:1087)",
        lambda: _to_cpu,
    ),
    f"{_RANDOM}._get_cuda_rng_state": Patch(
        "the original queues a callback for CUDA's lazy start and returns nothing", lambda: _rng_state
    ),
    f"{_RANDOM}._set_cuda_rng_state": Patch(
        "the original queues a callback for CUDA's lazy start for ever", lambda: _set_rng_state
    ),
    "megatron.core.optimizer.Adam": Patch(
        "torch.optim.AdamW, the fall-back, has a state that the distributed optimizer cannot load", lambda: FusedAdam
    ),
    "megatron.core.optimizer.clip_grads.l2_norm_impl": Patch(
        "the original brings each parameter's norm to the host by itself (utils.py:1206)", lambda: _l2_norm
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

# Of these, what a GPU needs without Transformer Engine and Apex.
WITHOUT_FUSED = tuple(path for path in PATCHES if path.startswith("megatron.core.optimizer."))


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


# By logger: what megatron-core logs at each start about what it means to do with itself, and a CUDA build of torch on
# a machine without a GPU, as a login node is.
LOG_NOISE = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


def _quiet(noise: str, record: logging.LogRecord) -> bool:
    return noise not in record.getMessage()


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
    r"barrier\(\): using the device under current context",
)


def _patch(patches: Mapping[str, Patch]) -> None:
    for path, patch in patches.items():
        module, name = _resolve(path)
        if not hasattr(module, name) and path != _ROUTER:
            have = f"megatron-core {versions.installed()} with torch {torch.__version__}"
            raise RuntimeError(f"{path} does not exist in {have}")
        _originals[path] = getattr(module, name, _nothing)
        setattr(module, name, patch.replacement())


@contextlib.contextmanager
def _without_trackers() -> Iterator[None]:
    """Spare each rank a second: mcore would import wandb and TensorBoard for what nothing here uses of it."""
    spared = [name for name in ("wandb", "tensorboard") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(spared))  # type: ignore[arg-type]  # None reads as not installed
    try:
        yield
    finally:
        for name in spared:
            del sys.modules[name]


def own_gpu(local_rank: int, visible: int) -> int:
    """Return which of the `visible` GPUs belongs to the rank of this number on its node.

    Where a single one is visible the launcher shows each rank its own, or a node has no other: `ranks.join` tells.
    Raises NoOwnGpu where several are visible and yet ranks would have to share.
    """
    if visible > 1 and local_rank >= visible:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise NoOwnGpu(
            f"rank {local_rank} of this node, counted from 0, has no GPU: it sees {visible} (CUDA_VISIBLE_DEVICES is "
            f"{shown}), and each rank needs its own; set resources.gpus_per_node to the number of ranks of a node"
        )
    return local_rank % visible


def init_device() -> None:
    """Prepare this process for megatron-core, once; later calls do nothing.

    Raises UserMistake when megatron-core has a version that is not known, RuntimeError when it was imported on a CPU
    machine before this call (its functions are then already wrapped by torch.compile).
    """
    global _ready, _mode
    if _ready:
        return
    release = versions.release()
    versions.check_imported()
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    for name, noise in LOG_NOISE.items():
        logging.getLogger(name).addFilter(functools.partial(_quiet, noise))
    if torch.cuda.is_available():
        torch.cuda.set_device(own_gpu(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()))
        # NCCL's monitor asks the store every second for a trace (ProcessGroupNCCL.cpp, HeartbeatMonitor::runLoop). Ours
        # is Python, which a thread of C++ must not enter while the process ends; and watch.py tells of a hang.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        with _without_trackers():
            importlib.import_module("megatron.core")
            lacks = importlib.import_module(
                "megatron.core.optimizer"
            ).USING_PYTORCH_OPTIMIZER  # what mcore could import
            _patch({path: PATCHES[path] for path in (_ROUTER, *(WITHOUT_FUSED if lacks else ()))})
        _ready = True
        return
    if "megatron.core.jit" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before init_device(): on CPU its functions are now compiled at first use. "
            "Call megatron_ext.device.init_device() first"
        )
    logging.getLogger(_RANDOM).addFilter(functools.partial(_quiet, "CPU RNG state changed"))
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # mcore warns where tensor parallelism lacks it
    with _without_trackers(), absent_triton.allowed(release.needs_triton):
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


def send(numbers: torch.Tensor) -> torch.Tensor:
    """Return a tensor of host memory on the device. A GPU copies it while the host goes on; torch keeps the source."""
    return numbers if is_cpu() else numbers.pin_memory().to(device(), non_blocking=True)


def backend() -> str:
    """Return the torch.distributed back end of that device."""
    return "gloo" if is_cpu() else "nccl"


@contextlib.contextmanager
def _no_random_states() -> Iterator[None]:
    """Have megatron-core's forks and checkpoints ask for no random state, as no recording may (CUDAGeneratorImpl)."""
    module, names = importlib.import_module(_RANDOM), ("_get_cuda_rng_state", "_set_cuda_rng_state")
    tracker, held = module.get_cuda_rng_tracker(), {name: getattr(module, name) for name in names}
    states = tracker.get_states()
    vars(module).update(dict.fromkeys(names, _nothing))
    try:
        yield
    finally:
        vars(module).update(held)
        tracker.set_states(states)


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
    with _no_random_states(), torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may copy meanwhile
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


def gpu_identity() -> str:
    """Return what names this rank's GPU among all of the node, whatever number it is seen under; "" without one."""
    return "" if is_cpu() else str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def machine() -> dict[str, Any]:
    """Return name, compute capability and cuDNN (91002 is 9.10.2) of this rank's GPU; {} without one."""
    gpu, cudnn = torch.cuda, torch.backends.cudnn.version
    return {} if is_cpu() else dict(gpu=gpu.get_device_name(), capability=gpu.get_device_capability(), cudnn=cudnn())
