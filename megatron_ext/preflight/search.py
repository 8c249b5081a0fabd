"""Which parallel plans fit some GPUs, and which of them is the fastest: a search over all legal ones."""

import itertools
import math
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, fields, replace

from megatron_ext.parallel.calibration import GIB
from megatron_ext.parallel.plan import RECOMPUTES, ParallelPlan, Workload, divisors
from megatron_ext.parallel.rules import is_legal
from megatron_ext.parallel.shape import MAMBA
from megatron_ext.preflight.facts import Training
from megatron_ext.preflight.flops import PredictedStep, step
from megatron_ext.preflight.memory import Memory, memory

HEADROOM = 0.95  # share of a GPU that a plan we offer may fill: activation formulas are not calibrated yet
MOST_GROWTH = 64  # times the GPUs asked for that a plan is looked for


MemoryOf = Callable[[ParallelPlan, Training], Memory]  # of a legal plan, on its fullest rank


@dataclass(frozen=True)
class Candidate:
    """A legal plan, the memory of its fullest rank and its predicted step."""

    plan: ParallelPlan
    memory: Memory
    step: PredictedStep | None  # None where the GPU is not known, or what a step computes


def legal_plans(t: Training, base: ParallelPlan) -> Iterator[ParallelPlan]:
    """Yield every legal plan with the micro-batch and context communication of `base`.

    Stages are even, tensor ranks within a node, experts whole (to cut an expert's matrices too makes them small and
    adds an exchange a layer; it hardly ever pays).
    """
    w, s = t.workload, t.known_shape
    degrees = divisors(w.ranks)
    tensors = [d for d in degrees if d <= t.gpus_per_node]
    experts = [d for d in degrees if s.experts and s.experts % d == 0] or [1]
    virtuals = (1,) if MAMBA in s.blocks or not w.pack_length else (1, 2)  # who samples has whole stages
    for tensor, pipeline, context in itertools.product(tensors, degrees, degrees):
        if w.ranks % (tensor * pipeline * context) or len(s.layers) % pipeline:
            continue
        for expert, virtual in itertools.product(experts, virtuals):
            plan = replace(
                base,
                tensor=tensor,
                sequence_parallel=tensor > 1,
                pipeline=pipeline,
                pipeline_layers=[],
                virtual=virtual,
                context=context,
                expert=expert,
                expert_tensor=1,
                recompute="none",
            )
            if is_legal(plan, w):
                yield plan


def search(t: Training, base: ParallelPlan, needs_of: MemoryOf = memory) -> list[Candidate]:
    """Return the legal plans that fit the GPUs, the fastest first; each with the least recomputation that fits."""
    timed = t.gpu and t.workload.pack_length
    candidates = []
    for plan in legal_plans(t, base):
        for recompute in RECOMPUTES:
            tried = replace(plan, recompute=recompute)
            needs = needs_of(tried, t)
            fits = t.capacity is None or needs.total <= HEADROOM * t.capacity
            if fits and is_legal(tried, t.workload):
                candidates.append(Candidate(tried, needs, step(tried, t) if timed else None))
                break
    return sorted(candidates, key=_rank)


def _rank(candidate: Candidate) -> tuple[float, int, float]:
    """Order the faster first; of those within about 1%, which is less than a prediction is worth, the one of fewer
    axes.
    """
    plan, seconds = candidate.plan, candidate.step.seconds if candidate.step else 1.0
    axes = sum(degree > 1 for degree in (plan.tensor, plan.pipeline, plan.virtual, plan.context, plan.expert))
    return round(100 * math.log(seconds)), axes, candidate.memory.total


def offer(plan: ParallelPlan, t: Training, needs_of: MemoryOf = memory) -> tuple[int, Candidate] | None:
    """Return (GPUs, the best plan that fits them): as many GPUs as asked for, else the fewest times as many.

    None where nothing fits MOST_GROWTH times as many.
    """
    for times in divisors(MOST_GROWTH):
        ranks = t.workload.ranks * times
        candidates = search(on_ranks(t, ranks), plan, needs_of)
        if candidates:
            return ranks, candidates[0]
    return None


def on_ranks(t: Training, ranks: int) -> Training:
    """Return the training on other ranks, with packs aligned to what a plan needs: they can be packed again."""
    return replace(t, workload=replace(t.workload, ranks=ranks, align=None))


def with_align(plan: ParallelPlan, w: Workload) -> str:
    """Return the words that ask for packs of another alignment, where a plan needs one that they have not; else ""."""
    unit = plan.document_unit()
    return f"; align {unit} in pack" if w.align and w.align % unit else ""


def offer_text(
    plan: ParallelPlan, t: Training, needs_of: MemoryOf = memory, lean: MemoryOf | None = None, words: str = ""
) -> str:
    """Return the words of a refusal that say which plan would fit, or that none does.

    `lean` is what a plan needs with the settings that `words` spell, which are asked for where they take fewer GPUs.
    """
    best_fit, besides = offer(plan, t, needs_of), ""
    leaner = offer(plan, t, lean) if lean else None
    if leaner and (best_fit is None or leaner[0] < best_fit[0]):
        best_fit, besides = leaner, f"{words} and "
    if best_fit is None:
        what = "packs" if t.workload.pack_length else "samples"
        return f"nothing fits up to {t.workload.ranks * MOST_GROWTH} GPUs: shorten the {what}"
    ranks, best = best_fit
    text = f"use {besides}{spell_plan(best.plan)}{with_align(best.plan, t.workload)} on {ranks} GPUs"
    return f"{text} ({best.memory.total / GIB:.1f} GiB)"


def spell_plan(plan: ParallelPlan) -> str:
    """Return what a plan says other than the default: "tensor 2, sequence_parallel, context 8"."""
    words = []
    for degree in fields(ParallelPlan):
        value, default = getattr(plan, degree.name), getattr(ParallelPlan(), degree.name)
        if value != default:
            words.append(degree.name if value is True else f"{degree.name} {value}")
    return ", ".join(words) or "all degrees 1"


def neighbours(plan: ParallelPlan, t: Training) -> list[Candidate]:
    """Return the plan with one field changed to the next legal value below or above, whether it fits or not."""
    near = []
    for name in ("tensor", "pipeline", "context", "expert", "recompute"):
        present = getattr(plan, name)
        values: list[int | str] = [*RECOMPUTES] if name == "recompute" else [*divisors(t.workload.ranks)]
        place = values.index(present) if present in values else 0
        for ordered in (values[:place][::-1], values[place + 1 :]):
            for value in ordered:
                tried = _with(plan, name, value)
                if is_legal(tried, t.workload):
                    near.append(Candidate(tried, memory(tried, t), step(tried, t) if t.gpu else None))
                    break
    return near


def _with(plan: ParallelPlan, name: str, value: int | str) -> ParallelPlan:
    changed = copy(plan)
    setattr(changed, name, value)
    return replace(changed, sequence_parallel=changed.tensor > 1)
