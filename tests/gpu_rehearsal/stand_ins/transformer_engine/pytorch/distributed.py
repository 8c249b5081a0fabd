"""Communication of linear layers over tensor ranks, activation checkpoints, and random states that graphs can hold."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint

_ALL_ACTIVE_RNG_STATES: dict[str, torch.Generator] = {}


def get_distributed_world_size(group=None):
    return dist.get_world_size(group=group) if dist.is_initialized() else 1


def set_tensor_model_parallel_attributes(tensor, is_parallel, dim, stride):
    """Mark a parameter as Megatron does."""
    for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        assert not hasattr(tensor, attribute)
    tensor.tensor_model_parallel = is_parallel
    tensor.partition_dim = dim
    tensor.partition_stride = stride


def gather_along_first_dim(inp, process_group, async_op=False, quantizer=None):
    """Return [size * T, ...] of the group's [T, ...] each, and no handle."""
    size = get_distributed_world_size(process_group)
    if size == 1:
        return inp, None
    parts = [torch.empty_like(inp) for _ in range(size)]
    dist.all_gather(parts, inp.contiguous(), group=process_group)
    return torch.cat(parts), None


def reduce_scatter_along_first_dim(inp, tp_group, async_op=False):
    """Return this rank's [T / size, ...] of the sum over the group, and no handle."""
    size = get_distributed_world_size(tp_group)
    if size == 1:
        return inp, None
    assert inp.shape[0] % size == 0, "First dimension of the tensor should be divisible by tensor parallel size"
    whole = inp.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole, group=tp_group)
    return whole.chunk(size)[dist.get_rank(tp_group)].contiguous(), None


class _Summed(torch.autograd.Function):
    """Sum over the group forward, nothing backward; or the other way round."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, forward_sums: bool) -> torch.Tensor:
        ctx.group, ctx.forward_sums = group, forward_sums
        return _all_reduced(x, group) if forward_sums else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return (grad if ctx.forward_sums else _all_reduced(grad, ctx.group)), None, None


class _Sequence(torch.autograd.Function):
    """All tokens of the group forward and this rank's share of the summed gradient backward; or the other way round."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, gathers: bool) -> torch.Tensor:
        ctx.group, ctx.gathers = group, gathers
        return (gather_along_first_dim if gathers else reduce_scatter_along_first_dim)(x, group)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        back = reduce_scatter_along_first_dim if ctx.gathers else gather_along_first_dim
        return back(grad, ctx.group)[0], None, None


def _all_reduced(x: torch.Tensor, group: Any) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def before_columns(x: torch.Tensor, group: Any, sequence_parallel: bool) -> torch.Tensor:
    """Give every tensor rank the input of a matrix whose columns are split."""
    return _Sequence.apply(x, group, True) if sequence_parallel else _Summed.apply(x, group, False)


def after_rows(x: torch.Tensor, group: Any, sequence_parallel: bool) -> torch.Tensor:
    """Add up the outputs of a matrix whose rows are split."""
    return _Sequence.apply(x, group, False) if sequence_parallel else _Summed.apply(x, group, True)


class activation_recompute_forward(AbstractContextManager, ContextDecorator):  # noqa: N801  (Transformer Engine's name)
    """Do nothing: it matters under FP8 only."""

    def __init__(self, activation_recompute=False, recompute_phase=False):
        self.activation_recompute, self.recompute_phase = activation_recompute, recompute_phase

    def __exit__(self, *exc_details):
        return None


def is_fp8_activation_recompute_enabled():
    return False


def checkpoint(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Keep the arguments instead of the activations of `function`."""
    reentrant = kwargs.pop("use_reentrant", True)
    distributed = kwargs.pop("distribute_saved_activations", False)
    for name in ("tp_group", "get_rng_state_tracker"):
        kwargs.pop(name, None)
    if distributed:
        assert torch.distributed.is_initialized(), "torch.distributed is not initialized."
    if reentrant:  # Transformer Engine's takes keywords as well, torch's does not
        return torch.utils.checkpoint.checkpoint(lambda *a: function(*a, **kwargs), *args, use_reentrant=True)
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


def get_all_rng_states():
    return _ALL_ACTIVE_RNG_STATES


def set_all_rng_states(states):
    global _ALL_ACTIVE_RNG_STATES
    _ALL_ACTIVE_RNG_STATES = states


def graph_safe_rng_available():
    return True


class CudaRNGStatesTracker:
    """Named random states. As on a GPU whose torch can put generators into graphs, they are torch.Generator objects."""

    def __init__(self):
        self.states_: dict[str, torch.Generator] = {}
        self.seeds_: set[int] = set()

    def reset(self):
        self.states_ = {}
        self.seeds_ = set()

    def get_states(self):
        return dict(self.states_)

    def set_states(self, states):
        self.states_ = states

    def add(self, name, seed):
        if seed in self.seeds_:
            raise RuntimeError(f"seed {seed} already exists")
        self.seeds_.add(seed)
        if name in self.states_:
            raise RuntimeError(f"cuda rng state {name} already exists")
        generator = torch.Generator()
        generator.manual_seed(seed)
        self.states_[name] = generator
        set_all_rng_states(self.states_)

    @contextlib.contextmanager
    def fork(self, name="model-parallel-rng") -> Iterator[None]:
        if name not in self.states_:
            raise KeyError(f"cuda rng state {name} is not added")
        kept = torch.default_generator.get_state()
        torch.default_generator.set_state(self.states_[name].get_state())  # a tensor here would be a fault of ours
        try:
            yield
        finally:
            self.states_[name].set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(kept)
