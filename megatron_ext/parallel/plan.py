"""Parallel degrees: what a plan says, what it has to carry, and which rank sits in which group. Pure Python.

Rank order is mcore's "tp-cp-ep-dp-pp" (parallel_state.py): tensor fastest, then context, data, pipeline last. The same
ranks are counted twice: the dense grid is tensor x context x data x pipeline, the expert grid expert_tensor x expert x
expert data x pipeline. Expert parallelism is no further factor of the number of ranks.

What is legal: rules.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_tools.base.declared import setting
from data_tools.mistake import Problem
from megatron_ext.parallel.machine import Machine
from megatron_ext.parallel.shape import ModelShape

CONTEXT_COMMS = ("p2p", "all_gather", "a2a")
RECOMPUTES = ("none", "selective", "full")
DEGREES = ("tensor", "pipeline", "virtual", "context", "expert", "expert_tensor", "micro_batch")


@dataclass
class ParallelPlan:
    """Degrees of each axis, and what else decides where numbers lie but not which.

    Data parallelism is what is left: ranks / (tensor * pipeline * context).
    """

    tensor: int = setting(1, "attention heads and MLP columns over so many ranks (TP)", unit="ranks", least=1)
    sequence_parallel: bool = setting(False, "norms and residuals sharded over the tensor axis, by tokens (SP)")
    pipeline: int = setting(1, "layers over so many ranks (PP)", unit="ranks", least=1)
    virtual: int = setting(1, "interleaved stages of a pipeline rank (VPP)", unit="stages", least=1, most=1024)
    pipeline_layers: list[int] = setting(
        list, "layers of each stage in model order; []: equally many", unit="layers", least=1
    )
    context: int = setting(1, "one sequence over so many ranks (CP)", unit="ranks", least=1)
    context_comm: str = setting(
        "all_gather", "how attention meets the other ranks' keys; p2p is Transformer Engine's", choices=CONTEXT_COMMS
    )
    expert: int = setting(1, "experts over so many ranks (EP)", unit="ranks", least=1)
    expert_tensor: int = setting(1, "an expert's columns over so many ranks (ETP)", unit="ranks", least=1)
    micro_batch: int = setting(1, "packs joined into one forward pass", unit="packs", least=1)
    recompute: str = setting(
        "none", "activations made again in backward; selective: of MLP and MoE blocks", choices=RECOMPUTES
    )

    @property
    def model(self) -> int:
        """Ranks that hold one copy of the dense part, CP ranks counted."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_model(self) -> int:
        """Ranks that hold one copy of the experts."""
        return self.expert_tensor * self.expert * self.pipeline

    @property
    def stages(self) -> int:
        return self.pipeline * self.virtual

    def data(self, ranks: int) -> int:
        """Return the data-parallel size; `check` has verified that it divides."""
        return ranks // self.model

    def expert_data(self, ranks: int) -> int:
        """Return how many ranks hold the same experts (EDP)."""
        return ranks // self.expert_model

    def stage_layers(self, layers: int) -> list[range]:
        """Return the layers (from 0) of each stage in model order. Stage s is rank s % pipeline's, its number s //
        pipeline.
        """
        counts = self.pipeline_layers or [layers // self.stages] * self.stages
        starts = [sum(counts[:stage]) for stage in range(len(counts))]
        return [range(start, start + count) for start, count in zip(starts, counts)]

    def token_unit(self) -> int:
        """Return the number of which a micro-batch's tokens are a multiple: zig-zag halves under CP, equal parts under
        SP.
        """
        halves = 2 * self.context if self.context > 1 else 1
        return math.lcm(halves, self.tensor * self.context if self.sequence_parallel else 1)

    def document_unit(self) -> int:
        """Return the number of which each document takes a multiple (`align` of pack): every rank holds two pieces of
        it.
        """
        return 2 * self.context if self.context > 1 else 1


@dataclass(frozen=True)
class Site:
    """Where a phase would run, and what upstream phases will have put into the folders that it names."""

    ranks: int
    nodes: int = 1
    gpus_per_node: int | None = None  # None: not known
    gpu: str = ""  # a name of calibration.GPUS; "": not known
    gpu_mem_gib: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)  # that the cluster's profile sets
    python: str = ""  # the ranks' interpreter, where it can be asked from here; "": not known
    forecasts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by folder


@dataclass(frozen=True)
class Workload:
    """What a plan has to carry and on what. A rule whose numbers are None is not asked."""

    ranks: int
    shape: ModelShape | None = None
    pack_length: int | None = None  # tokens
    align: int | None = None  # tokens, of the pack plan: each document takes a multiple
    longest: int | None = None  # tokens of the longest document
    global_batch: int | None = None  # packs an update
    backend: str = "torch"  # auto | torch | te (parts.py)
    machine: Machine | None = None  # None: nothing is known of it
    dtype: str = ""  # of the weights
    base: str = ""  # "mxfp4": matrices of experts, which are frozen, are held as its blocks
    gpus: bool | None = None  # False: the collectives are gloo's


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


# ---------------------------------------------------------------- who sits where


def multiples(value: int, unit: int) -> list[int]:
    """Return the multiples of `unit` around `value`."""
    below = value // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple > 0]


def even_as_can_be(layers: int, stages: int) -> list[int]:
    """Return the layers of each stage; the first, which has the embedding, is the last to take one of the surplus."""
    base, surplus = divmod(layers, stages)
    order = [*range(1, stages), 0]
    return [base + (stage in order[:surplus]) for stage in range(stages)]


@dataclass(frozen=True)
class Grid:
    """Who computes with whom. Each list of ranks is one group, in mcore's order."""

    tensor: list[list[int]]
    context: list[list[int]]
    data: list[list[int]]
    pipeline: list[list[int]]
    optimizer: list[list[int]]  # data x context: who shares the state of dense weights
    expert_tensor: list[list[int]]
    expert: list[list[int]]
    expert_data: list[list[int]]  # who shares the state of experts

    def place(self, axis: str, rank: int) -> int:
        """Return the rank's number within its group along `axis`."""
        return next(group.index(rank) for group in getattr(self, axis) if rank in group)


def _groups(sizes: Mapping[str, int], *axes: str) -> list[list[int]]:
    """Return the groups of ranks that differ in `axes` only. `sizes` counts ranks, its first axis fastest."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(math.prod(sizes.values())):
        rest, fixed = rank, []
        for axis, size in sizes.items():
            rest, place = divmod(rest, size)
            if axis not in axes:
                fixed.append(place)
        groups.setdefault(tuple(fixed), []).append(rank)
    return list(groups.values())


def grid(plan: ParallelPlan, ranks: int) -> Grid:
    """Return the groups of `ranks` ranks under a legal plan."""
    dense = {"tensor": plan.tensor, "context": plan.context, "data": plan.data(ranks), "pipeline": plan.pipeline}
    experts = {
        "expert_tensor": plan.expert_tensor,
        "expert": plan.expert,
        "expert_data": plan.expert_data(ranks),
        "pipeline": plan.pipeline,
    }
    return Grid(
        **{axis: _groups(dense, axis) for axis in dense},
        optimizer=_groups(dense, "context", "data"),
        **{axis: _groups(experts, axis) for axis in experts if axis != "pipeline"},
    )


# ---------------------------------------------------------------- what ranks need besides


def padded_rows(rows: int, tensor: int) -> int:
    """Return the rows of the vocabulary matrices for `rows` tokens split over `tensor` ranks.

    `rows` is the checkpoint's number of rows. No padding where they split evenly, else up to a multiple of
    8 * tensor, so that a rank's part suits tensor cores.
    """
    if rows % tensor == 0:
        return rows
    unit = 8 * tensor
    return -(-rows // unit) * unit


def environment(plan: ParallelPlan) -> dict[str, str]:
    """Return the variables that every rank must have before CUDA starts.

    One hardware queue, so that a collective launched before a kernel also starts before it (Hopper and older).
    """
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if plan.tensor > 1 or plan.context > 1 else {}


def environment_problems(plan: ParallelPlan, given: Mapping[str, str], where: str = "parallel") -> list[Problem]:
    """Return a problem for each variable that the environment `given` to the ranks sets to something else."""
    degrees = f"tensor {plan.tensor} and context {plan.context} need"
    return [
        Problem(where, f"{degrees} {name}={value}, and the environment says {given[name]}: unset it (profile: env.set)")
        for name, value in environment(plan).items()
        if given.get(name, value) != value
    ]
