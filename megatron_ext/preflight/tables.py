"""What `afterok plan --parallel` shows of a parallel plan: rank grid, memory, predicted step and other plans."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from megatron_ext.lora.settings import reach, reach_text
from megatron_ext.parallel.calibration import CALIBRATION_GPU, GIB, LONG, PUBLISHED
from megatron_ext.parallel.parts import Choice, choose
from megatron_ext.parallel.plan import DEGREES, RECOMPUTES, ParallelPlan, Site, Workload, grid
from megatron_ext.parallel.rules import is_legal, needs_of
from megatron_ext.preflight.facts import Training
from megatron_ext.preflight.flops import cost_coefficients, kind_of, step
from megatron_ext.preflight.memory import Memory, divides, memory
from megatron_ext.preflight.search import (
    HEADROOM,
    Candidate,
    neighbours,
    offer,
    on_ranks,
    search,
    spell_plan,
    with_align,
)

SHOWN = 8  # plans of a search


def report(plan: ParallelPlan, t: Training, site: Site, searching: bool, packed: bool = True) -> dict[str, Any]:
    """Return {"facts", "tables", "notes"}: numbers for programs, the same as tables for people, and their sources.

    `searching` ranks the legal plans of these GPUs; without it the plan's legal neighbours are shown. Of what is not
    `packed` (samples) there is no time and no search.
    """
    w = t.workload
    facts: dict[str, Any] = {"plan": asdict(plan), "ranks": w.ranks}
    tables, notes = [], []
    legal = all(getattr(plan, name) >= 1 for name in DEGREES) and is_legal(plan, w)
    if legal:
        facts["plan"]["data"] = plan.data(w.ranks)
        facts["grid"] = vars(grid(plan, w.ranks))
        tables += [_groups_table(facts["grid"], w.ranks, site), _nodes_table(facts["grid"], w.ranks, site)]
    choice = choose(w.backend, needs_of(plan, w))
    facts["backend"], facts["parts"], facts["assumed"] = w.backend, choice.facts(), list(t.assumed)
    tables.append(_parts_table(w.backend, choice))
    notes += [f"assumed: {sentence}" for sentence in t.assumed]
    if not w.shape or not w.pack_length:
        return {"facts": facts, "tables": tables, "notes": [*notes, _unknown(w, packed)]}
    facts["parameters"], facts["active"] = t.known_shape.parameters.total, t.known_shape.active
    facts["costs"] = dict(zip(("cost_linear", "cost_quadratic"), cost_coefficients(t.known_shape)))
    notes.append(
        f"{t.known_shape.parameters.total:,} parameters, {t.known_shape.active:,} active a token, {t.dtype}; packs of "
        f"{w.pack_length:,} tokens, {w.global_batch} an update"
    )
    if t.lora.rank:
        facts["lora"] = reach(t.lora, t.known_shape)
        notes.append(reach_text(facts["lora"], t.lora.rank))
    costs = " ".join(f"{name}={value:.5g}" for name, value in facts["costs"].items())
    notes.append(f"for pack: {costs} (FLOPs of a document of L tokens: linear L + quadratic L²)")
    if divides(plan, w):
        needs = memory(plan, t)
        facts["memory"] = {name: size / GIB for name, size in vars(needs).items()} | {"total": needs.total / GIB}
        tables.append(_memory_table(plan, t))
        fitting = offer(plan, t) if t.capacity and needs.total > t.capacity else None
        facts["offer"] = {"ranks": fitting[0], **_candidate_facts(fitting[1])} if fitting else None
    if legal and t.gpu:
        facts["step"] = vars(step(plan, t))
        tables.append(_step_table(plan, t))
    if searching:
        candidates = search(on_ranks(t, w.ranks), plan)
        facts["search"] = [_candidate_facts(candidate) for candidate in candidates]
        title = f"{len(candidates)} legal plans fit {w.ranks} GPUs; the fastest"
        tables.append(_candidates_table(title, candidates[:SHOWN], w))
    else:
        near = neighbours(plan, on_ranks(t, w.ranks))
        facts["neighbours"] = [_candidate_facts(candidate) for candidate in near]
        tables.append(_candidates_table("legal neighbours: one field changed", near, w))
    return {"facts": facts, "tables": tables, "notes": notes + _sources(t)}


def _unknown(w: Workload, packed: bool) -> str:
    """Say what is not known of a training, and what cannot be told therefore."""
    if w.shape and not packed:
        return "lengths of samples are not known: no time or search"
    what = "the pack length" if w.shape else "the model's config.json"
    return f"{what} is not known yet: no memory, time or search"


def _parts_table(backend: str, choice: Choice) -> dict[str, Any]:
    rows = [[name, part["is"], part["why"]] for name, part in choice.facts().items()]
    return {"title": f"whose layers, backend {backend}", "columns": ["part", "whose", "why"], "rows": rows}


def _candidate_facts(candidate: Candidate) -> dict[str, Any]:
    return {
        "plan": asdict(candidate.plan),
        "align": candidate.plan.document_unit(),
        "total_gib": candidate.memory.total / GIB,
        "step": vars(candidate.step) if candidate.step else None,
    }


def _candidates_table(title: str, candidates: list[Candidate], w: Workload) -> dict[str, Any]:
    rows = []
    for candidate in candidates:
        s = candidate.step
        time = [f"{s.seconds:.1f}", f"{s.tokens_per_s:,.0f}", f"{s.mfu:.0%}"] if s else [""] * 3
        rows.append(
            [spell_plan(candidate.plan) + with_align(candidate.plan, w), f"{candidate.memory.total / GIB:.1f}", *time]
        )
    return {"title": title, "columns": ["plan", "GiB", "step s", "tokens/s a GPU", "MFU"], "rows": rows}


def _memory_table(plan: ParallelPlan, t: Training) -> dict[str, Any]:
    by_mode = {mode: memory(replace(plan, recompute=mode), t) for mode in RECOMPUTES}
    rows = [
        [name.replace("_", " "), *(f"{getattr(needs, name) / GIB:.1f}" for needs in by_mode.values())]
        for name in (*(component.name for component in fields(Memory)), "state", "total")
        if any(getattr(needs, name) for needs in by_mode.values())
    ]
    size = f" of {t.capacity / GIB:.1f}" if t.capacity else ""
    columns = ["GiB on the fullest GPU", *(f"recompute {mode}" for mode in by_mode)]
    return {"title": f"memory{size} GiB, {spell_plan(plan)}", "columns": columns, "rows": rows}


def _step_table(plan: ParallelPlan, t: Training) -> dict[str, Any]:
    update = step(plan, t)
    row = [f"{update.seconds:.1f}", f"{update.compute:.1f}", f"{update.communication:.1f}", f"{update.bubble:.1f}"]
    row += [f"{update.tokens_per_s:,.0f}", f"{update.mfu:.0%}", f"{update.hfu:.0%}"]
    columns = ["step s", "compute", "communication", "bubble", "tokens/s a GPU", "MFU", "HFU"]
    return {"title": "predicted step", "columns": columns, "rows": [row]}


def _groups_table(groups: Mapping[str, list[list[int]]], ranks: int, site: Site) -> dict[str, Any]:
    per_node = max(ranks // site.nodes, 1)
    rows = []
    for axis, members in groups.items():
        spans = max(len({rank // per_node for rank in group}) for group in members)
        rows.append([axis, len(members[0]), len(members), _progression(members[0]), _progression(members[-1]), spans])
    columns = ["axis", "size", "groups", "ranks of the first", "of the last", "nodes a group spans"]
    return {"title": f"{ranks} ranks on {site.nodes} nodes", "columns": columns, "rows": rows}


def _nodes_table(groups: Mapping[str, list[list[int]]], ranks: int, site: Site) -> dict[str, Any]:
    """Show for each node the places of its ranks in their groups."""
    per_node = max(ranks // site.nodes, 1)
    axes = [axis for axis in groups if axis != "optimizer"]
    places = {axis: {rank: i for group in groups[axis] for i, rank in enumerate(group)} for axis in axes}
    rows = []
    for node in range(ranks // per_node):
        ranks_here = range(node * per_node, (node + 1) * per_node)
        there = [_progression(sorted({places[axis][rank] for rank in ranks_here})) for axis in axes]
        rows.append([node, _progression(ranks_here), *there])
    return {"title": "places in those groups", "columns": ["node", "ranks", *axes], "rows": rows}


def _progression(numbers: Sequence[int]) -> str:
    """Return numbers of equal distance in short: "3", "0-7", "0-56 by 8"."""
    first, last = numbers[0], numbers[-1]
    by = numbers[1] - first if len(numbers) > 1 else 1
    return str(first) if first == last else f"{first}-{last}" + (f" by {by}" if by > 1 else "")


def _sources(t: Training) -> list[str]:
    known = "documents as in the pack plan" if t.documents.known else "assumed: one document a pack, all supervised"
    notes = [f"derived: memory and FLOPs (fused kernels; {known}), communication (data sheets, nothing overlapped)"]
    if t.gpu:
        rows = f"{PUBLISHED[kind_of(t.known_shape)].source}; {LONG.source}"
        notes.append(f"measured by others: kernel speed on {CALIBRATION_GPU} ({rows}); peak and links: {t.gpu.source}")
    room = f"plans that are offered fill at most {HEADROOM:.0%} of a GPU; we measured nothing of this on a GPU"
    return [*notes, room]
