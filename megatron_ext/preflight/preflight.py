"""Before a training phase queues: do its parallel plan, model, packs and GPUs go together, and what would it cost?

Model and packs may still have to be made by phases upstream. What those will hold is forecast: by import_hf the
config.json of its source, by pack the length and alignment of packs. What nobody knows yet is not asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake
from megatron_ext.lora.settings import LoraConfig, reach, reach_text
from megatron_ext.models.registry import parse_config
from megatron_ext.parallel import rules as parallel_rules
from megatron_ext.parallel.calibration import CALIBRATION_GPU, GIB, GPUS, LONG, PUBLISHED
from megatron_ext.parallel.plan import (
    DEGREES,
    RECOMPUTES,
    ParallelPlan,
    Site,
    Workload,
    divisors,
    environment_problems,
    grid,
)
from megatron_ext.parallel.rules import is_legal
from megatron_ext.preflight.planner import (
    HEADROOM,
    Candidate,
    Documents,
    Memory,
    Training,
    cost_coefficients,
    kind_of,
    memory,
    search,
    step,
)

SHOWN = 8  # plans of a search
MOST_GROWTH = 64  # times the GPUs asked for that a plan is looked for


# ---------------------------------------------------------------- what is known


def model_config(folder: str, site: Site) -> tuple[dict[str, Any] | None, str]:
    """(config.json of a model folder, where it is), or what its phase will write; None where neither is known."""
    path = Path(folder) / "hf" / "config.json"
    try:
        return durable.read_json(inside(Path(folder), "hf/config.json")), str(path)
    except (OSError, ValueError, UserMistake):
        return site.forecasts.get(folder, {}).get("hf_config"), str(path)


def model_adapter(folder: str, site: Site) -> tuple[bool, LoraConfig | None]:
    """(whether it is known, the adapter that a model folder has or will have)."""
    try:
        facts = durable.read_json(inside(Path(folder), "model.json"))
    except (OSError, ValueError, UserMistake):
        facts = site.forecasts.get(folder, {})
    adapter = facts.get("adapter")
    return bool(facts), LoraConfig(**adapter["lora"]) if adapter else None


def forecast(model: str, lora: LoraConfig, site: Site) -> dict[str, Any]:
    """What the model folder of a training on the model folder `model` will hold."""
    adapter = {"adapter": {"lora": asdict(lora)}} if lora.rank else {}
    return {"hf_config": model_config(model, site)[0], **adapter}


def pack_facts(folder: str, site: Site) -> dict[str, Any]:
    """plan.json of a pack output, or what pack will write of it."""
    try:
        return durable.read_json(Path(folder) / "plan.json")
    except (OSError, ValueError):
        return dict(site.forecasts.get(folder, {}))


def _lengths(folder: str) -> Any:
    """Tokens of each packed document, int array; None where the plan is not there yet."""
    from data_tools.packs.plan import read_plan

    try:
        return read_plan(Path(folder))[1].pieces.length
    except UserMistake:
        return None


def prepare(
    model: str, packs: str, global_batch: int, dtype: str, backend: str, site: Site
) -> tuple[Training, list[Problem]]:
    """What a training on the model folder `model` and the pack plan `packs` would carry, as far as it is known."""
    shape, problems = None, []
    config, where = model_config(model, site) if model else (None, "")
    if config is not None:
        family, dims, problems = parse_config(config, where)
        if dims is not None:
            shape, dtype = family.config.shape(dims), dtype or dims.dtype
    facts = pack_facts(packs, site) if packs else {}
    length = facts.get("pack_length")
    workload = Workload(
        site.ranks,
        shape,
        pack_length=length,
        align=facts.get("align"),
        global_batch=global_batch,
        backend=backend,
        gpus=None if site.gpus_per_node is None else site.gpus_per_node > 0,
    )
    lengths = _lengths(packs) if shape and length else None
    window = shape.window if shape else 0
    if lengths is None:
        documents, supervised = Documents.one(length or 1, window), 1.0
    else:
        documents = Documents.of(lengths, facts["packs"], window)
        workload = replace(workload, longest=int(lengths.max()))
        supervised = facts["targets"] / (facts["packs"] * length)
    training = Training(
        workload,
        documents,
        supervised,
        dtype or "bfloat16",
        gpu=GPUS.get(site.gpu),
        memory_gib=site.gpu_mem_gib,
        gpus_per_node=max(site.ranks // site.nodes, 1),
    )
    return training, problems


# ---------------------------------------------------------------- what is refused


def check(plan: ParallelPlan, t: Training, site: Site) -> list[Problem]:
    """Every broken rule, and whether the plan fits the GPUs, where their memory is known."""
    problems = parallel_rules.check(plan, t.workload) + environment_problems(plan, site.environment)
    known = t.shape and t.workload.pack_length and t.capacity and site.gpus_per_node
    if known and _divides(plan, t.workload):
        needs = memory(plan, t)
        if needs.total > t.capacity:
            problems.append(Problem("parallel", f"{_shortage(needs, t)}: {offer_text(plan, t)}"))
    return problems


def _shortage(needs: Memory, t: Training) -> str:
    rest = needs.total - needs.state - needs.activations - needs.logits
    parts = {"state": needs.state, "activations": needs.activations, "logits": needs.logits, "other": rest}
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    return f"needs {needs.total / GIB:.1f} GiB a GPU ({listed}), and a GPU has {t.capacity / GIB:.1f}"


def offer(plan: ParallelPlan, t: Training) -> tuple[int, Candidate] | None:
    """(GPUs, the best plan that fits them): as many as asked for, else the fewest times as many."""
    for times in divisors(MOST_GROWTH):
        ranks = t.workload.ranks * times
        found = search(_on(t, ranks), plan)
        if found:
            return ranks, found[0]
    return None


def _on(t: Training, ranks: int) -> Training:
    """The training on other ranks, with packs aligned to what a plan needs: they can be packed again."""
    return replace(t, workload=replace(t.workload, ranks=ranks, align=None))


def _again(plan: ParallelPlan, w: Workload) -> str:
    """What a plan needs of the packs that they have not."""
    unit = plan.document_unit()
    return f"; align {unit} in pack" if w.align and w.align % unit else ""


def offer_text(plan: ParallelPlan, t: Training) -> str:
    found = offer(plan, t)
    if found is None:
        return f"nothing fits up to {t.workload.ranks * MOST_GROWTH} GPUs: shorten the packs"
    ranks, best = found
    text = f"use {spell_plan(best.plan)}{_again(best.plan, t.workload)} on {ranks} GPUs"
    return f"{text} ({best.memory.total / GIB:.1f} GiB)"


def spell_plan(plan: ParallelPlan) -> str:
    """What a plan says other than the default: "tensor 2, sequence_parallel, context 8"."""
    words = []
    for one in fields(ParallelPlan):
        value, plain = getattr(plan, one.name), getattr(ParallelPlan(), one.name)
        if value != plain:
            words.append(one.name if value is True else f"{one.name} {value}")
    return ", ".join(words) or "all degrees 1"


# ---------------------------------------------------------------- what is shown


def report(plan: ParallelPlan, t: Training, site: Site, searching: bool) -> dict[str, Any]:
    """{"facts", "tables", "notes"}: numbers for programs, the same as tables for people, and where they come from.

    `searching` ranks the legal plans of these GPUs; without it the plan's legal neighbours are shown.
    """
    w = t.workload
    facts: dict[str, Any] = {"plan": asdict(plan), "ranks": w.ranks}
    tables, notes = [], []
    legal = all(getattr(plan, name) >= 1 for name in DEGREES) and is_legal(plan, w)
    if legal:
        facts["plan"]["data"] = plan.data(w.ranks)
        facts["grid"] = vars(grid(plan, w.ranks))
        tables += [_groups_table(facts["grid"], w.ranks, site), _nodes_table(facts["grid"], w.ranks, site)]
    if not t.shape or not w.pack_length:
        what = "the model's config.json" if not t.shape else "the pack length"
        return {"facts": facts, "tables": tables, "notes": [f"{what} is not known yet: no memory, time or search"]}
    facts["parameters"], facts["active"] = t.shape.parameters.total, t.shape.active
    facts["costs"] = dict(zip(("cost_linear", "cost_quadratic"), cost_coefficients(t.shape)))
    notes.append(
        f"{t.shape.parameters.total:,} parameters, {t.shape.active:,} active a token, {t.dtype}; packs of "
        f"{w.pack_length:,} tokens, {w.global_batch} an update"
    )
    if t.lora.rank:
        facts["lora"] = reach(t.lora, t.shape)
        notes.append(reach_text(facts["lora"], t.lora.rank))
    costs = " ".join(f"{name}={value:.5g}" for name, value in facts["costs"].items())
    notes.append(f"for pack: {costs} (FLOPs of a document of L tokens: linear L + quadratic L²)")
    if _divides(plan, w):
        needs = memory(plan, t)
        facts["memory"] = {name: size / GIB for name, size in vars(needs).items()} | {"total": needs.total / GIB}
        tables.append(_memory_table(plan, t))
        found = offer(plan, t) if t.capacity and needs.total > t.capacity else None
        facts["offer"] = {"ranks": found[0], **_candidate_facts(found[1])} if found else None
    if legal and t.gpu:
        facts["step"] = vars(step(plan, t))
        tables.append(_step_table(plan, t))
    if searching:
        found = search(_on(t, w.ranks), plan)
        facts["search"] = [_candidate_facts(one) for one in found]
        title = f"{len(found)} legal plans fit {w.ranks} GPUs; the fastest"
        tables.append(_candidates_table(title, found[:SHOWN], w))
    else:
        near = neighbours(plan, _on(t, w.ranks))
        facts["neighbours"] = [_candidate_facts(one) for one in near]
        tables.append(_candidates_table("legal neighbours: one field changed", near, w))
    return {"facts": facts, "tables": tables, "notes": notes + _sources(t)}


def _divides(plan: ParallelPlan, w: Workload) -> bool:
    """Whether memory can be reckoned at all; a plan may be illegal for other reasons."""
    if any(getattr(plan, name) < 1 for name in DEGREES) or w.ranks % plan.model or w.ranks % plan.expert_model:
        return False
    return sum(plan.pipeline_layers) == len(w.shape.layers) or len(w.shape.layers) % plan.stages == 0


def neighbours(plan: ParallelPlan, t: Training) -> list[Candidate]:
    """The plan with one field changed to the next legal value below or above, whether it fits or not."""
    found = []
    for name in ("tensor", "pipeline", "context", "expert", "recompute"):
        present = getattr(plan, name)
        values = list(RECOMPUTES) if name == "recompute" else divisors(t.workload.ranks)
        place = values.index(present) if present in values else 0
        for ordered in (values[:place][::-1], values[place + 1 :]):
            tried = (replace(plan, **{name: value}) for value in ordered)
            tried = (replace(one, sequence_parallel=one.tensor > 1) for one in tried)
            one = next((one for one in tried if is_legal(one, t.workload)), None)
            if one is not None:
                found.append(Candidate(one, memory(one, t), step(one, t) if t.gpu else None))
    return found


def _candidate_facts(one: Candidate) -> dict[str, Any]:
    return {
        "plan": asdict(one.plan),
        "align": one.plan.document_unit(),
        "total_gib": one.memory.total / GIB,
        "step": vars(one.step) if one.step else None,
    }


def _candidates_table(title: str, found: list[Candidate], w: Workload) -> dict[str, Any]:
    rows = []
    for one in found:
        s = one.step
        time = [f"{s.seconds:.1f}", f"{s.tokens_per_s:,.0f}", f"{s.mfu:.0%}"] if s else [""] * 3
        rows.append([spell_plan(one.plan) + _again(one.plan, w), f"{one.memory.total / GIB:.1f}", *time])
    return {"title": title, "columns": ["plan", "GiB", "step s", "tokens/s a GPU", "MFU"], "rows": rows}


def _memory_table(plan: ParallelPlan, t: Training) -> dict[str, Any]:
    modes = [replace(plan, recompute=mode) for mode in RECOMPUTES]
    by_mode = {one.recompute: memory(one, t) for one in modes}
    rows = [
        [name.replace("_", " "), *(f"{getattr(needs, name) / GIB:.1f}" for needs in by_mode.values())]
        for name in (*(one.name for one in fields(Memory)), "state", "total")
        if any(getattr(needs, name) for needs in by_mode.values())
    ]
    size = f" of {t.capacity / GIB:.1f}" if t.capacity else ""
    columns = ["GiB on the fullest GPU", *(f"recompute {mode}" for mode in by_mode)]
    return {"title": f"memory{size} GiB, {spell_plan(plan)}", "columns": columns, "rows": rows}


def _step_table(plan: ParallelPlan, t: Training) -> dict[str, Any]:
    found = step(plan, t)
    row = [f"{found.seconds:.1f}", f"{found.compute:.1f}", f"{found.communication:.1f}", f"{found.bubble:.1f}"]
    row += [f"{found.tokens_per_s:,.0f}", f"{found.mfu:.0%}", f"{found.hfu:.0%}"]
    columns = ["step s", "compute", "communication", "bubble", "tokens/s a GPU", "MFU", "HFU"]
    return {"title": "predicted step", "columns": columns, "rows": [row]}


def _groups_table(groups: Mapping[str, list[list[int]]], ranks: int, site: Site) -> dict[str, Any]:
    per_node = max(ranks // site.nodes, 1)
    rows = []
    for axis, found in groups.items():
        spans = max(len({rank // per_node for rank in group}) for group in found)
        rows.append([axis, len(found[0]), len(found), _progression(found[0]), _progression(found[-1]), spans])
    columns = ["axis", "size", "groups", "ranks of the first", "of the last", "nodes a group spans"]
    return {"title": f"{ranks} ranks on {site.nodes} nodes", "columns": columns, "rows": rows}


def _nodes_table(groups: Mapping[str, list[list[int]]], ranks: int, site: Site) -> dict[str, Any]:
    """For each node the places of its ranks in their groups."""
    per_node = max(ranks // site.nodes, 1)
    axes = [axis for axis in groups if axis != "optimizer"]
    places = {axis: {rank: i for group in groups[axis] for i, rank in enumerate(group)} for axis in axes}
    rows = []
    for node in range(ranks // per_node):
        mine = range(node * per_node, (node + 1) * per_node)
        there = [_progression(sorted({places[axis][rank] for rank in mine})) for axis in axes]
        rows.append([node, _progression(mine), *there])
    return {"title": "places in those groups", "columns": ["node", "ranks", *axes], "rows": rows}


def _progression(numbers: Sequence[int]) -> str:
    """Numbers of equal distance: "3", "0-7", "0-56 by 8"."""
    first, last = numbers[0], numbers[-1]
    by = numbers[1] - first if len(numbers) > 1 else 1
    return str(first) if first == last else f"{first}-{last}" + (f" by {by}" if by > 1 else "")


def _sources(t: Training) -> list[str]:
    known = "documents as in the pack plan" if t.documents.known else "assumed: one document a pack, all supervised"
    notes = [f"derived: memory and FLOPs (fused kernels; {known}), communication (data sheets, nothing overlapped)"]
    if t.gpu:
        rows = f"{PUBLISHED[kind_of(t.shape)].source}; {LONG.source}"
        notes.append(f"measured by others: kernel speed on {CALIBRATION_GPU} ({rows}); peak and links: {t.gpu.source}")
    room = f"plans that are offered fill at most {HEADROOM:.0%} of a GPU; we measured nothing of this on a GPU"
    return [*notes, room]
