"""What this rank puts into a checkpoint: regions of whole tensors, each with its elements, and copies of them.

Keys and shapes are those of mcore's distributed checkpoints (`fully_reshardable`), so that mcore reads them under any
layout. The way there is ours. mcore gathers the optimizer's state of all data ranks on each of them before a save
(distrib_optimizer.py:977, three fp32 tensors of everything, through host memory); here each rank hands in the flat
range that its optimizer holds, cut into boxes of the tensor, and no state is sent to anybody.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)

from megatron_ext.files.digest import tensor_sum
from megatron_ext.models.registry import stages
from megatron_ext.weights import whole_state
from megatron_ext.weights.dist_weights import Region

EXTRA_STATE = "_extra_state"
ADAPTERS = "adapters."  # where a part of a model has LoRA's (lora/adapters.py)
STATES = ("param", "exp_avg", "exp_avg_sq")  # of the optimizer, under mcore's names
Shape = tuple[int, ...]
Model = torch.nn.Module | list[torch.nn.Module]  # or the parts of an interleaved pipeline (registry.stages)


@dataclass(frozen=True)
class Part:
    """A region of a checkpoint's tensor and its elements, which are live: the next update changes them."""

    region: Region
    data: torch.Tensor
    rows: int = 0  # of the vocabulary, without padding; 0: dimension 0 is no padded vocabulary


def metadata() -> dict[str, Any]:
    """Return the metadata for every sharded_state_dict of mcore."""
    # The default sharding type is broken in 0.16.1 (mapping.py:104), and dp_reshardable cannot change
    # the tensor degree.
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,  # experts' state has the same keys whether or not they are over ranks
        "non_homogeneous_layers": True,  # one key a layer in every family, as Megatron will always have it
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def model_state(model: Model) -> dict[str, Any]:
    """Return what of the whole model this rank holds, as mcore's sharded tensors; LoRA's adapters are none of it.

    Without the extra states of linear layers: they are empty but under FP8, and differ between layer specs, which are
    to read each other's weights.
    """
    return _state(model, lambda name: not name.startswith(ADAPTERS) and not is_extra_state(name))


def is_extra_state(name: str) -> bool:
    """Return whether a name of a state is that of a linear layer's extra state.

    Transformer Engine's grouped experts have one each: `_extra_state`, `_extra_state1`, `_extra_state2`, ...
    """
    return name.rpartition(".")[2].startswith(EXTRA_STATE)


def is_packed(part: torch.nn.Module, name: str) -> bool:
    """Return whether the parameter is held as blocks of fewer bits, which no distributed checkpoint has (blocks.py)."""
    parameter = dict(part.named_parameters()).get(name)
    return parameter is not None and parameter.dtype == torch.uint8


def adapter_state(model: Model) -> dict[str, Any]:
    """Return LoRA's adapters alone, as `model_state` returns the model."""
    return _state(model, lambda name: name.startswith(ADAPTERS))


def trained_state(model: Model) -> dict[str, Any]:
    """Return what training changes: the adapters where there are any, else the model."""
    return adapter_state(model) if is_adapted(model) else model_state(model)


def is_adapted(model: Model) -> bool:
    """Return whether LoRA's adapters are on it; the same on every rank."""
    return hasattr(stages(model)[0], ADAPTERS.removesuffix("."))


def _state(model: Model, wanted: Callable[[str], bool]) -> dict[str, Any]:
    states = {f"stage{i}": part.sharded_state_dict(metadata=metadata()) for i, part in enumerate(stages(model))}
    return {stage: {name: value for name, value in state.items() if wanted(name)} for stage, state in states.items()}


# ---------------------------------------------------------------- weights


def _region(shard: ShardedTensor, offset: Shape, size: Shape) -> Region:
    """Return the box of `size` at `offset` of a shard's local tensor, as a region of the whole."""
    ahead = shard.prepend_axis_num
    start = [o + b for o, b in zip(shard.global_offset, (*[0] * ahead, *offset))]
    return Region(shard.key, tuple(shard.global_shape), tuple(start), (*[1] * ahead, *size))


class Weights:
    """The model's regions that this rank saves: of those that several ranks hold, each rank takes some. `state` says
    what of the model: all, its adapters, or what is trained."""

    def __init__(self, model: Model, state: Callable[[Model], dict[str, Any]] = model_state):
        self._model, self._state = model, state
        self._distribution: Any = None  # of replicas over data and context ranks; found at the first save

    def parts(self) -> list[Part]:
        """Return the parts that this rank writes. Every data and context rank takes part in the first call."""
        state, group = self._state(self._model), parallel_state.get_data_parallel_group(with_context_parallel=True)
        apply_factories(state)
        if group.size() > 1:
            if self._distribution is None:
                self._distribution = determine_main_replica_uniform_distribution(state, group)
            distribute_main_replicas_with_precomputed_distribution(state, group, self._distribution)
        rows = stages(self._model)[0].vocabulary_rows
        return [
            # allow_shape_mismatch is mcore's mark of a padded vocabulary
            Part(
                _region(shard, (0,) * shard.data.dim(), tuple(shard.data.shape)),
                shard.data,
                rows if shard.allow_shape_mismatch else 0,
            )
            for shard in nested_values(state)
            if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id)
        ]


# ---------------------------------------------------------------- optimizer


def boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape, int]]:
    """Return (offset, size, its first element) of boxes that make up elements `start` to `stop` of a row-major tensor:
    whole rows, and what is cut of the first and last one.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,), start) if shape else ((), (), 0)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        first = last = start // row
        cuts: Sequence[tuple[int, int, int]] = [(first, start, stop)]
    else:
        cuts = [(first - 1, start, first * row), (last, last * row, stop)]
        if first < last:
            yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]), first * row
    for at, low, high in cuts:
        for offset, size, place in boxes(shape[1:], low - at * row, high - at * row):
            yield (at, *offset), (1, *size), at * row + place


def _shards_of(holder: ShardedBase, shape: Shape) -> Iterator[tuple[ShardedTensor, int]]:
    """Yield (shard, place in the flat parameter of its first element) of all that a parameter is cut into for
    checkpoints.

    A factory cuts numbered elements, which tell where each shard came from.
    """
    if isinstance(holder, ShardedTensor):
        yield holder, 0
        return
    assert isinstance(holder, ShardedTensorFactory)
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    for shard in nested_values(replace(holder, data=numbers).build()):
        flat = shard.data.reshape(-1)
        first = int(flat[0])
        if int(flat[-1]) - first + 1 != flat.numel():
            raise RuntimeError(f"{shard.key} is no run of the elements of its parameter: its state cannot be saved")
        yield shard, first


@dataclass(frozen=True)
class _Piece:
    """A box of the parameter `model_param` that this rank's optimizer holds, as elements of its flat share."""

    region: Region
    start: int
    stop: int


class OptimizerState:
    """The regions of an optimizer's state that this rank saves. They stay what they are during a run."""

    def __init__(self, model: Model, optimizer: Any):
        self._optimizers = optimizer.chained_optimizers
        self._pieces: list[tuple[Any, torch.Tensor, list[_Piece]]] = []
        for part in trained_state(model).values():
            holders = whole_state.holders_of(part)
            for chained in self._optimizers:
                self._pieces += (_held_whole if whole_state.is_whole(chained) else _held)(chained, holders)

    def parts(self) -> list[Part]:
        found = []
        for optimizer, parameter, pieces in self._pieces:
            whole = whole_state.is_whole(optimizer)
            if whole:
                state = whole_state.states(optimizer, parameter)
            else:
                state = optimizer._get_main_param_and_optimizer_states(parameter)
            for name in state if whole else STATES:
                held = state[name] if name in state else torch.zeros_like(state["param"])  # it never stepped yet
                flat = held.detach().reshape(-1)
                for piece in pieces:
                    region = replace(piece.region, key=f"optimizer.state.{name}.{piece.region.key}")
                    found.append(Part(region, flat[piece.start : piece.stop].reshape(region.size)))
        return found

    def updates(self) -> int:
        """Return how often the optimizer has stepped; 0 on a rank that holds nothing of it."""
        groups = [
            group
            for chained in self._optimizers
            for group in (
                chained.optimizer.param_groups
                if whole_state.is_whole(chained)
                else chained.state_dict()["optimizer"]["param_groups"]
            )
        ]
        return max((int(group.get("step") or 0) for group in groups), default=0)


def _held(optimizer: Any, holders: dict[torch.Tensor, ShardedBase]) -> Iterator[tuple[Any, torch.Tensor, list[_Piece]]]:
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, range_map in bucket["param_map"].items():
                    holder = holders.get(parameter)
                    # The last number counts data ranks, each of which holds a range of its own.
                    if holder is None or any(holder.replica_id[:-1]):
                        continue
                    mine = range_map["param"]
                    pieces = [
                        _Piece(
                            _region(shard, offset, size),
                            first + place - mine.start,
                            first + place - mine.start + math.prod(size),
                        )
                        for shard, first in _shards_of(holder, tuple(parameter.shape))
                        for offset, size, place in boxes(
                            tuple(shard.local_shape),
                            max(mine.start - first, 0),
                            min(mine.end - first, math.prod(shard.local_shape)),
                        )
                    ]
                    yield optimizer, parameter, pieces


def _held_whole(
    optimizer: Any, holders: dict[torch.Tensor, ShardedBase]
) -> Iterator[tuple[Any, torch.Tensor, list[_Piece]]]:
    for parameter, holder in whole_state.held(optimizer, holders):
        if is_main_replica(holder.replica_id):
            yield (
                optimizer,
                parameter,
                [
                    _Piece(
                        _region(shard, (0,) * shard.data.dim(), tuple(shard.local_shape)),
                        first,
                        first + math.prod(shard.local_shape),
                    )
                    for shard, first in _shards_of(holder, tuple(parameter.shape))
                ],
            )


def wanted_optimizer(optimizer: Any, weights: dict[str, Any]) -> dict[Any, Any]:
    """Return what is to be loaded of the optimizer's state, for `fill_optimizer`; `weights` is the `trained_state`."""
    if any(map(whole_state.is_whole, optimizer.chained_optimizers)):
        return {str(i): whole_state.wanted(part, weights) for i, part in enumerate(optimizer.chained_optimizers)}
    found: dict[Any, Any] = optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata())
    return found


def fill_optimizer(optimizer: Any, weights: dict[str, Any], loaded: dict[Any, Any], updates: int) -> None:
    """Give the optimizer the tensors `loaded` under mcore's names; of several chained ones, each those of its number.

    All but tensors and the count of updates is a matter of settings, which a resuming run shares.
    """
    chained = optimizer.chained_optimizers
    if any(map(whole_state.is_whole, chained)):
        for i, part in enumerate(chained):
            whole_state.fill(part, weights, loaded[str(i)], updates)
        return
    states = [loaded] if len(chained) == 1 else [loaded[i] for i in range(len(chained))]
    for part, tensors in zip(chained, states):
        state = part.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = updates
        part.load_state_dict({**state, **tensors, "param_state_sharding_type": "fully_reshardable"})


# ---------------------------------------------------------------- copies and sums


class Staging:
    """Copies of parts in host memory, which is kept from one save to the next."""

    def __init__(self) -> None:
        self._kept: dict[Region, torch.Tensor] = {}

    def copy(self, parts: Sequence[Part]) -> list[Part]:
        """Return the parts with copies of their elements, complete when it returns."""
        copies = []
        for part in parts:
            box = self._kept.get(part.region)
            if box is None or box.dtype != part.data.dtype:
                box = torch.empty(part.data.shape, dtype=part.data.dtype, pin_memory=part.data.is_cuda)
                self._kept[part.region] = box
            copies.append(replace(part, data=box.copy_(part.data, non_blocking=True)))
        torch.cuda.synchronize()
        return copies


def sums(parts: Sequence[Part]) -> dict[str, tuple[str, Shape, int]]:
    """Return {key: (dtype, shape, sum)} of what these parts contribute to a digest of weights; padding rows do not
    count.
    """
    totals: dict[str, tuple[str, Shape, int]] = {}
    for part in parts:
        region, data = part.region, part.data.reshape(part.region.size)
        shape = region.shape
        if part.rows:  # padding is at the end of dimension 0
            shape = (part.rows, *shape[1:])
            data = data[: max(0, part.rows - region.offset[0])]
        dtype = str(data.dtype).removeprefix("torch.")
        before = totals[region.key][2] if region.key in totals else 0
        totals[region.key] = dtype, shape, before + int(tensor_sum(data, region.offset, shape))
    return totals
