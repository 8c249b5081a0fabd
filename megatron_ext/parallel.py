"""Parallel degrees: what a user may ask for, why not, and which rank sits in which group. Pure Python.

Rank order is mcore's "tp-cp-ep-dp-pp" (parallel_state.py): tensor fastest, then context, data, pipeline last. Rules and
their sources: reference/megatron.md 2.1 and 2.2.
"""

from dataclasses import dataclass

from data_tools.mistake import Problem


@dataclass
class ParallelPlan:
    """Degrees of each axis. Data parallelism is what is left: world / (tensor * pipeline * context)."""

    tensor: int = 1  # attention heads and MLP columns over ranks (TP)
    sequence_parallel: bool = False  # norms and residuals sharded over the tensor axis, by tokens (SP)
    pipeline: int = 1  # layers over ranks (PP)
    context: int = 1  # one sequence over ranks (CP)
    expert: int = 1  # experts over ranks (EP)
    expert_tensor: int = 1  # an expert's columns over ranks (ETP)
    micro_batch: int = 1  # packs joined into one forward pass

    @property
    def model(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    def data(self, world_size: int) -> int:
        """Data-parallel size; `check` has verified that it divides."""
        return world_size // self.model


@dataclass(frozen=True)
class Grid:
    """Who computes with whom. Every list of ranks is one group, in group order."""

    tensor: list[list[int]]
    data: list[list[int]]

    def data_rank(self, rank: int) -> int:
        return next(group.index(rank) for group in self.data if rank in group)

    def tensor_rank(self, rank: int) -> int:
        return next(group.index(rank) for group in self.tensor if rank in group)


def grid(plan: ParallelPlan, world_size: int) -> Grid:
    """The groups of `world_size` ranks, in mcore's order (tensor fastest)."""
    size = plan.tensor
    starts = range(0, world_size, size)
    return Grid(
        tensor=[list(range(start, start + size)) for start in starts],
        data=[list(range(offset, world_size, size)) for offset in range(size)],
    )


def padded_rows(rows: int, tensor: int) -> int:
    """Rows of the vocabulary matrices for `rows` tokens split over `tensor` ranks.

    `rows` is the checkpoint's number of rows. No padding where they split evenly, else up to a multiple of
    8 * tensor, so that a rank's part suits tensor cores (reference/megatron.md 1.6).
    """
    if rows % tensor == 0:
        return rows
    unit = 8 * tensor
    return -(-rows // unit) * unit


def nearest(value: int, legal: list[int]) -> int:
    """The legal value closest to `value`, the smaller of two equally close ones."""
    return min(legal, key=lambda candidate: (abs(candidate - value), candidate))


def legal_tensor(heads: int, kv_groups: int, ffn: int) -> list[int]:
    """Tensor degrees that split query heads, KV groups (or replicate them evenly) and MLP columns."""
    return [
        t for t in range(1, heads + 1) if heads % t == 0 and ffn % t == 0 and (kv_groups % t == 0 or t % kv_groups == 0)
    ]


def check(
    plan: ParallelPlan,
    world_size: int,
    *,
    heads: int | None = None,
    kv_groups: int | None = None,
    ffn: int | None = None,
    pack_length: int | None = None,
    global_batch: int | None = None,
    where: str = "parallel",
) -> list[Problem]:
    """All rules that `plan` breaks on `world_size` ranks, each with the numbers and the nearest legal value.

    `heads`, `kv_groups` and `ffn` (columns) are the model's, `pack_length` is in tokens, `global_batch` in packs; a
    rule whose numbers are None is not asked.
    """
    problems: list[Problem] = []

    def refuse(field: str, message: str) -> None:
        problems.append(Problem(f"{where}.{field}", message))

    degrees = ("tensor", "pipeline", "context", "expert", "expert_tensor", "micro_batch")
    positive = True
    for field in degrees:
        if getattr(plan, field) < 1:
            refuse(field, f"{getattr(plan, field)} is not a degree: the least is 1")
            positive = False
    for field in ("pipeline", "context", "expert", "expert_tensor"):
        if getattr(plan, field) > 1:
            refuse(field, f"{getattr(plan, field)} is not supported yet: use 1")
    if not positive:
        return problems

    if world_size % plan.model:
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        refuse(
            "tensor",
            f"{world_size} ranks do not divide by tensor {plan.tensor} x pipeline {plan.pipeline} x context "
            f"{plan.context} = {plan.model}: use {nearest(plan.model, divisors)}, or {plan.model} ranks",
        )
    if heads is not None and kv_groups is not None and ffn is not None:
        legal = legal_tensor(heads, kv_groups, ffn)
        if plan.tensor not in legal:
            refuse(
                "tensor",
                f"{plan.tensor} does not split {heads} heads, {kv_groups} KV groups and {ffn} MLP columns evenly: "
                f"use {nearest(plan.tensor, legal)} (legal: {', '.join(map(str, legal))})",
            )
    if plan.sequence_parallel and plan.tensor == 1:
        refuse("sequence_parallel", "needs tensor > 1 (here 1): set it to false")
    if plan.sequence_parallel and pack_length is not None and pack_length * plan.micro_batch % plan.tensor:
        up = -(-pack_length // plan.tensor) * plan.tensor
        refuse(
            "sequence_parallel",
            f"{pack_length} tokens a pack do not divide by tensor {plan.tensor}: use a pack length of {up}",
        )
    if global_batch is not None and world_size % plan.model == 0:
        unit = plan.data(world_size) * plan.micro_batch
        if global_batch < 1 or global_batch % unit:
            legal = max(1, round(global_batch / unit)) * unit
            refuse(
                "micro_batch",
                f"a global batch of {global_batch} packs does not divide by {plan.data(world_size)} data-parallel "
                f"ranks x micro-batch {plan.micro_batch} = {unit}: use {legal} packs",
            )
    return problems
