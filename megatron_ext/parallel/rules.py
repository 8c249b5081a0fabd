"""What a parallel plan may be, why not, and the nearest value that may. Pure Python.

A rule is a function of plan and workload that says what is wrong. The nearest legal value comes from the rules
themselves: of a field's candidates the one closest to what was asked that breaks none of them. The rules are those that
megatron-core 0.16.1 asserts (or breaks without an assertion) and those of our own layers.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from data_tools.base import declared
from data_tools.mistake import Problem
from megatron_ext.parallel import parts
from megatron_ext.parallel.plan import (
    CONTEXT_COMMS,
    RECOMPUTES,
    ParallelPlan,
    Workload,
    divisors,
    even_as_can_be,
    multiples,
)
from megatron_ext.parallel.shape import MAMBA, MLP, MOE, MXFP4_BLOCK
from megatron_ext.versions import planned

Broken = Callable[[ParallelPlan, Workload], str]  # what is wrong with a plan, "" where nothing is


@dataclass(frozen=True)
class Rule:
    """A rule, whose `broken(plan, workload)` says what is wrong, "" where nothing is. A change of any one of `fields`
    (of plan or workload) may mend it, the best first.
    """

    fields: tuple[str, ...]
    broken: Broken


RULES: list[Rule] = []


def rule(*names: str) -> Callable[[Broken], Broken]:
    """Register a function as a rule about the fields `names`."""

    def register(broken: Broken) -> Broken:
        RULES.append(Rule(names, broken))
        return broken

    return register


@rule("tensor", "context", "pipeline", "ranks")
def ranks_divide_by_the_dense_grid(p: ParallelPlan, w: Workload) -> str:
    product = f"tensor {p.tensor} x pipeline {p.pipeline} x context {p.context} = {p.model}"
    return f"{w.ranks} ranks do not divide by {product}" if w.ranks % p.model else ""


@rule("expert", "expert_tensor", "pipeline", "ranks")
def ranks_divide_by_the_expert_grid(p: ParallelPlan, w: Workload) -> str:
    product = f"expert_tensor {p.expert_tensor} x expert {p.expert} x pipeline {p.pipeline} = {p.expert_model}"
    return f"{w.ranks} ranks do not divide by {product}" if w.ranks % p.expert_model else ""


@rule("tensor")
def tensor_splits_attention(p: ParallelPlan, w: Workload) -> str:
    """Want whole KV groups on a rank, or a group evenly replicated (transformer_config.py:940)."""
    s = w.shape
    if not s or not s.heads:
        return ""
    shared = p.tensor % s.kv_groups == 0 and not s.wide_qk_norm  # a norm over all heads knows no replicas
    even = s.heads % p.tensor == 0 and (s.kv_groups % p.tensor == 0 or shared)
    if not even:
        return f"{p.tensor} does not split {s.heads} heads and {s.kv_groups} KV groups evenly"
    rows = (s.heads + 2 * s.kv_groups) * s.head_dim  # of one matrix, cut before groups are replicated
    return f"{p.tensor} does not split the {rows:,} rows of queries, keys and values" if rows % p.tensor else ""


@rule("context")
def context_splits_yarns_positions(p: ParallelPlan, w: Workload) -> str:
    """Want YaRN's original positions in zig-zag halves: each rank keeps its part (yarn_rotary_pos_embedding.py)."""
    positions = w.shape.yarn_positions if w.shape else 0
    if p.context == 1 or positions % (2 * p.context) == 0:
        return ""
    return f"2 x {p.context} zig-zag halves do not split YaRN's {positions:,} original positions evenly"


@rule("tensor")
def tensor_splits_mlp_columns(p: ParallelPlan, w: Workload) -> str:
    if not w.shape:
        return ""
    columns = {"MLP": w.shape.ffn if MLP in w.shape.blocks else 0, "shared-expert": w.shape.shared_ffn}
    uneven = [f"{count} {name} columns" for name, count in columns.items() if count % p.tensor]
    return f"{p.tensor} does not split {' and '.join(uneven)} evenly" if uneven else ""


@rule("tensor")
def tensor_splits_mamba(p: ParallelPlan, w: Workload) -> str:
    s = w.shape
    if not s or MAMBA not in s.blocks or s.mamba_heads % p.tensor == s.mamba_groups % p.tensor == 0:
        return ""
    return f"{p.tensor} does not split {s.mamba_heads} Mamba heads and {s.mamba_groups} Mamba groups evenly"


@rule("context", "tensor")
def context_splits_mamba(p: ParallelPlan, w: Workload) -> str:
    """Want Mamba's heads to split: under CP it spreads heads, not tokens (mamba_context_parallel.py:99-122)."""
    s = w.shape
    if not s or MAMBA not in s.blocks or tensor_splits_mamba(p, w):
        return ""
    heads, groups = s.mamba_heads // p.tensor, s.mamba_groups // p.tensor
    if heads % p.context:
        return f"{p.context} does not split the {heads} Mamba heads of a tensor rank evenly"
    even = p.context % groups == 0 if p.context > groups else groups % p.context == 0
    return "" if even else f"{p.context} neither divides nor is a multiple of a tensor rank's {groups} Mamba groups"


@rule("context_comm", "context", "tensor")
def all_to_all_splits_heads(p: ParallelPlan, w: Workload) -> str:
    """Want heads to split: Ulysses hands every context rank whole heads."""
    s = w.shape
    if not s or not s.heads or p.context == 1 or p.context_comm != "a2a" or tensor_splits_attention(p, w):
        return ""
    heads = s.heads // p.tensor
    uneven = f"a2a over context {p.context} does not split the {heads} heads of a tensor rank evenly"
    return uneven if heads % p.context else ""


def needs_of(p: ParallelPlan, w: Workload) -> parts.Needs:
    """Return what the choice of a layer's parts depends on."""
    return parts.Needs(w.machine, w.shape, plan=p, dtype=w.dtype, base=w.base)


@rule("backend")
def te_runs_on_gpus(p: ParallelPlan, w: Workload) -> str:
    """Refuse it before the phase queues: a package that is installed where plan runs computes nothing on a CPU."""
    wrong = w.backend == parts.TE and w.gpus is False
    return "Transformer Engine needs GPUs, and the phase has none" if wrong else ""


@rule("context_comm", "context")
def context_communication_is_known_to_attention(p: ParallelPlan, w: Workload) -> str:
    if p.context == 1 or p.context_comm != "p2p" or w.backend == parts.TE:
        return ""
    if w.backend == parts.AUTO and w.machine is None:
        return ""
    choice = parts.choose(w.backend, needs_of(p, w))
    if choice.parts.attention == parts.TE:
        return ""
    why = choice.reasons.get("attention", "the model has none")
    return f"p2p is Transformer Engine's ring, and attention is ours here ({why}), which has all_gather and a2a"


def _of_te(limit: parts.Limit, *names: str) -> None:
    """Register that backend te is refused where Transformer Engine has not what the model needs."""

    @functools.wraps(limit)
    def broken(p: ParallelPlan, w: Workload) -> str:
        return limit(needs_of(p, w)) if w.backend == parts.TE else ""

    RULES.append(Rule(names, broken))


_of_te(parts.te_is_installed, "backend")
_of_te(parts.te_has_no_kernel_for_packed_sinks, "backend")
_of_te(parts.te_has_no_ring_for_windows, "context_comm", "context")
_of_te(parts.te_gathers_no_packs, "context_comm", "context")
_of_te(parts.te_exchanges_whole_kv_groups, "context_comm", "context", "tensor")
_of_te(parts.te_has_an_attention_kernel_here, "backend")
_of_te(parts.te_norms_have_weights, "backend")
_of_te(parts.te_multiplies_float32_exactly, "backend")


@rule("base", "expert_tensor")
def base_has_blocks(p: ParallelPlan, w: Workload) -> str:
    """Want experts whose rows are whole blocks of MXFP4 on each rank (layers/mxfp4.py)."""
    s = w.shape
    if not w.base or not s:
        return ""
    if not s.experts:
        return "the model has no experts to hold as MXFP4"
    columns = s.hidden, s.expert_ffn // p.expert_tensor
    if any(count % MXFP4_BLOCK for count in columns):
        return f"experts with rows of {columns[0]} and {columns[1]} values have no whole blocks of {MXFP4_BLOCK}"
    return ""


@rule("base", "backend")
def base_is_held_by_ours(p: ParallelPlan, w: Workload) -> str:
    return "Transformer Engine has no experts over MXFP4 blocks" if w.base and w.backend == parts.TE else ""


OF_PARTS = tuple(one for one in RULES if one.broken.__name__.startswith(("te_", "base_", "context_communication")))


@rule("pack_length", "context", "tensor")
def tokens_divide(p: ParallelPlan, w: Workload) -> str:
    if w.pack_length is None or w.pack_length * p.micro_batch % p.token_unit() == 0:
        return ""
    reasons = [f"2 x context {p.context} zig-zag halves"] if p.context > 1 else []
    if p.sequence_parallel:
        reasons.append(f"tensor {p.tensor} x context {p.context} sequence-parallel parts")
    packs = f"{p.micro_batch} packs of " if p.micro_batch > 1 else ""
    return f"{packs}{w.pack_length:,} tokens do not divide by {p.token_unit()} ({', '.join(reasons)})"


@rule("align", "context")
def documents_divide(p: ParallelPlan, w: Workload) -> str:
    if w.align is None or w.align % p.document_unit() == 0:
        return ""
    pieces = f"context {p.context} cuts each into {p.document_unit()} pieces"
    return f"packs align documents to {w.align} tokens, and {pieces}"


@rule("longest")
def documents_fit_the_positions(p: ParallelPlan, w: Workload) -> str:
    if not w.shape or not w.shape.max_positions or (w.longest or 0) <= w.shape.max_positions:
        return ""
    return f"the longest document has {w.longest:,} tokens, the model {w.shape.max_positions:,} positions"


@rule("sequence_parallel", "tensor")
def sequence_parallel_needs_tensor(p: ParallelPlan, w: Workload) -> str:
    return "needs tensor > 1 (here 1)" if p.sequence_parallel and p.tensor == 1 else ""


@rule("sequence_parallel", "tensor")
def experts_need_sequence_parallel(p: ParallelPlan, w: Workload) -> str:
    """Refuse what mcore refuses in the first training step only (moe_layer.py)."""
    wrong = w.shape and MOE in w.shape.blocks and p.tensor > 1 and not p.sequence_parallel
    return f"a model with experts trains at tensor {p.tensor} only with sequence_parallel" if wrong else ""


@rule("expert")
def expert_splits_experts(p: ParallelPlan, w: Workload) -> str:
    if p.expert == 1 or not w.shape:
        return ""
    if not w.shape.experts:
        return "the model has no experts"
    return f"{p.expert} does not split {w.shape.experts} experts evenly" if w.shape.experts % p.expert else ""


@rule("expert_tensor")
def expert_tensor_splits_expert_columns(p: ParallelPlan, w: Workload) -> str:
    if p.expert_tensor == 1 or not w.shape:
        return ""
    if not w.shape.experts:
        return "the model has no experts"
    uneven = w.shape.expert_ffn % p.expert_tensor
    return f"{p.expert_tensor} does not split {w.shape.expert_ffn} expert columns evenly" if uneven else ""


@rule("expert_tensor")
def expert_biases_stay_whole(p: ParallelPlan, w: Workload) -> str:
    """Refuse what transformer_config.py:1590 refuses."""
    wrong = w.shape and w.shape.expert_bias and p.expert_tensor > 1
    return f"experts with biases cannot be split over expert_tensor {p.expert_tensor}" if wrong else ""


@rule("expert", "expert_tensor", "tensor")
def experts_are_reduced_over_tensor_ranks(p: ParallelPlan, w: Workload) -> str:
    """Refuse what mcore gets wrong without a word: expert gradients are marked for their own groups by EP > 1 only
    (layers.py:829), so whole experts on several tensor ranks keep a share each (measured: gradient norm x 0.707). 0.19
    has it right.
    """
    if planned().reduces_whole_experts:
        return ""
    wrong = w.shape and MOE in w.shape.blocks and p.expert == 1 and p.expert_tensor < p.tensor
    numbers = f"tensor {p.tensor} with expert_tensor {p.expert_tensor} and expert 1"
    return f"{numbers} gives wrong expert gradients without an error" if wrong else ""


OF_TRAINING = (experts_need_sequence_parallel, experts_are_reduced_over_tensor_ranks)


@rule("expert_tensor", "expert")
def gloo_gathers_even_parts_only(p: ParallelPlan, w: Workload) -> str:
    wrong = w.gpus is False and p.expert > 1 and p.expert_tensor > 1
    numbers = f"expert_tensor {p.expert_tensor} with expert {p.expert}"
    return f"{numbers} needs an uneven all-gather, which gloo (CPU) lacks" if wrong else ""


@rule("pipeline", "pipeline_layers", "virtual")
def stages_are_even_or_listed(p: ParallelPlan, w: Workload) -> str:
    if not w.shape or p.pipeline_layers or len(w.shape.layers) % p.stages == 0:
        return ""
    virtual = f" x virtual {p.virtual}" if p.virtual > 1 else ""
    return f"{len(w.shape.layers)} layers do not divide by pipeline {p.pipeline}{virtual}, and pipeline_layers is empty"


@rule("pipeline_layers")
def listed_stages_hold_all_layers(p: ParallelPlan, w: Workload) -> str:
    listed = p.pipeline_layers
    if not listed:
        return ""
    if len(listed) != p.stages:
        return f"{listed} are {len(listed)} stages, pipeline {p.pipeline} x virtual {p.virtual} = {p.stages}"
    if w.shape and sum(listed) != len(w.shape.layers):
        return f"{listed} are {sum(listed)} layers, the model has {len(w.shape.layers)}"
    return ""


@rule("pipeline_layers")
def hybrid_stages_differ_at_the_ends_only(p: ParallelPlan, w: Workload) -> str:
    """Want equal stages in between: mamba_block.py:172 knows a first and a last number of layers only."""
    wrong = w.shape and MAMBA in w.shape.blocks and len(set(p.pipeline_layers[1:-1])) > 1
    return f"{p.pipeline_layers}: in a hybrid model only the first and the last stage may differ" if wrong else ""


@rule("virtual", "pipeline")
def virtual_needs_pipeline(p: ParallelPlan, w: Workload) -> str:
    return f"{p.virtual} stages a rank need pipeline > 1 (here 1)" if p.virtual > 1 and p.pipeline == 1 else ""


@rule("virtual")
def hybrids_are_not_interleaved(p: ParallelPlan, w: Workload) -> str:
    """Refuse what mamba_block.py:173 refuses."""
    wrong = w.shape and MAMBA in w.shape.blocks and p.virtual > 1
    return f"{p.virtual}: a hybrid Mamba model has no interleaved pipeline" if wrong else ""


@rule("global_batch", "micro_batch")
def global_batch_divides(p: ParallelPlan, w: Workload) -> str:
    unit = p.data(w.ranks) * p.micro_batch
    if w.global_batch is None or w.ranks % p.model or w.global_batch % unit == 0:
        return ""
    factors = f"{p.data(w.ranks)} data-parallel ranks x micro-batch {p.micro_batch} = {unit}"
    return f"a global batch of {w.global_batch} packs does not divide by {factors}"


@rule("global_batch", "virtual", "micro_batch")
def interleaving_takes_whole_rounds(p: ParallelPlan, w: Workload) -> str:
    """Want what schedules.py:995-1015 wants, with its default group of `pipeline` micro-batches."""
    if p.virtual == 1 or w.global_batch is None or w.ranks % p.model or global_batch_divides(p, w):
        return ""
    count = w.global_batch // (p.data(w.ranks) * p.micro_batch)
    uneven = count % p.pipeline
    return f"{count} micro-batches do not divide by pipeline {p.pipeline}, as interleaving needs" if uneven else ""


# ---------------------------------------------------------------- the nearest legal value


def broken_rules(plan: ParallelPlan, workload: Workload) -> list[tuple[Rule, str]]:
    """Return every rule that is broken, with its sentence. Degrees below 1 break nothing here: ask `check`."""
    said = ((rule, rule.broken(plan, workload)) for rule in RULES)
    return [(rule, message) for rule, message in said if message]


def is_legal(plan: ParallelPlan, workload: Workload) -> bool:
    return not any(rule.broken(plan, workload) for rule in RULES)


def nearest(value: int, legal: Iterable[int]) -> int:
    """Return the legal value closest to `value`, the smaller of two equally close ones."""
    return min(legal, key=lambda candidate: (abs(candidate - value), candidate))


def candidates(name: str, plan: ParallelPlan, workload: Workload) -> list[Any]:
    """Return the values of a field of plan or workload that could be legal, the nearest to the present one first."""
    w, unit = workload, plan.data(workload.ranks) * plan.micro_batch or 1
    layers, batch = len(w.shape.layers) if w.shape else plan.stages, w.global_batch or 1
    values: dict[str, Callable[[], Iterable[int]]] = {
        "ranks": lambda: multiples(w.ranks, math.lcm(plan.model, plan.expert_model)),
        "pack_length": lambda: multiples(w.pack_length or 1, math.lcm(plan.token_unit(), w.align or 1)),
        "align": lambda: multiples(w.align or 1, plan.document_unit()),
        "longest": lambda: [w.shape.max_positions] if w.shape else [],
        "global_batch": lambda: {*multiples(batch, unit), *multiples(batch, unit * plan.pipeline)},
        "virtual": lambda: range(1, layers + 1),
        "micro_batch": lambda: divisors(batch),
    }
    if name == "sequence_parallel":
        return [not plan.sequence_parallel]
    words = {"context_comm": CONTEXT_COMMS, "recompute": RECOMPUTES, "backend": parts.BACKENDS, "base": parts.BASES}
    if name in words:
        return list(words[name])
    if name == "pipeline_layers":
        return [[], even_as_can_be(layers, plan.stages)] if layers >= plan.stages else [[]]
    present = getattr(plan if hasattr(plan, name) else w, name)
    possible = values.get(name, lambda: divisors(w.ranks))()
    return sorted(possible, key=lambda value: (abs(value - present), value))


def change(plan: ParallelPlan, workload: Workload, name: str, value: Any) -> tuple[ParallelPlan, Workload]:
    """Return plan and workload with one field of either set."""
    if hasattr(plan, name):
        return replace(plan, **{name: value}), workload
    return plan, replace(workload, **{name: value})


def remedy(broken: Rule, plan: ParallelPlan, workload: Workload) -> tuple[str, Any] | None:
    """Return (field, nearest value) that mends a broken rule: one that leaves nothing else broken if there is any."""
    partial = None
    for name in broken.fields:
        for value in candidates(name, plan, workload):
            changed = change(plan, workload, name, value)
            if broken.broken(*changed):
                continue
            if is_legal(*changed):
                return name, value
            partial = partial or (name, value)
    return partial


_SPELLED = {
    "ranks": "{} ranks",
    "pack_length": "a pack length of {:,} tokens",
    "align": "align: {} in pack",
    "longest": "documents of at most {:,} tokens",
    "global_batch": "a global batch of {} packs",
}


def spell(name: str, value: Any) -> str:
    """Return a remedy in words: "tensor 4", "a pack length of 12,000 tokens"."""
    text = str(value).lower() if isinstance(value, bool) else '""' if value == "" else value
    return _SPELLED.get(name, f"{name} {{}}").format(text)


def check(plan: ParallelPlan, workload: Workload, where: str = "parallel") -> list[Problem]:
    """All rules that `plan` breaks, each with the numbers and the nearest legal value."""
    return declared.check(plan, where) or _problems(broken_rules(plan, workload), plan, workload, where)


def check_forward(plan: ParallelPlan, workload: Workload, where: str = "parallel") -> list[Problem]:
    """Check a phase that trains nothing, of which the rules about training are not asked."""
    if problems := declared.check(plan, where):
        return problems
    asked = [found for found in broken_rules(plan, workload) if found[0].broken not in OF_TRAINING]
    return _problems(asked, plan, workload, where)


def check_parts(plan: ParallelPlan, workload: Workload, where: str = "parallel") -> list[Problem]:
    """Return what the model, the machine or the plan need of a part of the layers that the backend does not have."""
    of_parts = [found for found in broken_rules(plan, workload) if found[0] in OF_PARTS]
    return _problems(of_parts, plan, workload, where)


def _problems(broken: list[tuple[Rule, str]], plan: ParallelPlan, workload: Workload, where: str) -> list[Problem]:
    own = {one.name for one in fields(plan)}
    problems = []
    for one, message in broken:
        mend = remedy(one, plan, workload)
        place = f"{where}.{mend[0]}" if mend and mend[0] in own else where
        if mend and mend[0] in ("backend", "base"):  # a setting beside the plan
            place = mend[0]
        problems.append(Problem(place, message + (f": use {spell(*mend)}" if mend else "")))
    return problems
