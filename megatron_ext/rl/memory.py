"""What a GRPO needs of a GPU: in an update, and while it samples, with keys and values in place of activations.

With adapters also what it would need with its base held otherwise (ModelSettings.base). What does not fit the GPUs is
refused, with the settings that would make it fit. Derived, as in preflight/memory.py; nothing was measured. No torch.

    update     weights, gradients and optimizer of what is trained, activations and logits of the longest row
    rollouts   the same weights; gradients and optimizer unless `offload` is on; keys and values (at most
               engine.kv_gib) and recurrent states; activations of one pass, logits of max_batch samples
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from data_tools.mistake import Problem
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel.calibration import GIB
from megatron_ext.parallel.parts import BASES, MXFP4
from megatron_ext.parallel.plan import ParallelPlan, Site, padded_rows
from megatron_ext.parallel.rules import base_has_blocks
from megatron_ext.parallel.shape import ATTENTION, MAMBA, WINDOW, ModelShape
from megatron_ext.preflight import refusals
from megatron_ext.preflight.facts import Training, model_adapter
from megatron_ext.preflight.memory import (
    Memory,
    Stage,
    divides,
    exchange_bytes,
    layer_activations,
    stage_memory,
    stages,
    weight_bytes,
)
from megatron_ext.preflight.search import HEADROOM, offer_text
from megatron_ext.rl.dealing import most_prompts, most_samples
from megatron_ext.rl.settings import GrpoSettings, loads_reference
from megatron_ext.rollout.room import BYTES, block_bytes, room

UPDATE, ROLLOUTS = "update", "rollouts"
# A logit of a sample while its token is drawn (rollout/sampler.py): the model's and those stacked in bf16, in fp32, its
# weight in fp32, and in fp64 the weight and its running sum. With filters also what is kept and the digits of its bits.
DRAWN_BYTES, FILTERED_BYTES = 2 + 2 + 4 + 4 + 8 + 8, 2 + 2 + 4 + 4 + 4 + 8 + 4 + 1 + 8 + 8
STATE_BYTES, NUMBER_BYTES = 4, 8  # a value of a recurrent state, in fp32; the number of a document


def longest_sample(config: GrpoSettings, shape: ModelShape) -> int | None:
    """Return the most tokens of a prompt with its completion; None where nothing limits the prompt."""
    if config.prompt_tokens:
        return config.prompt_tokens + config.sampling.max_tokens
    return shape.max_positions or None


def longest_row(config: GrpoSettings, shape: ModelShape) -> int:
    """Return the tokens of the longest row that is trained. A sample's last token is only a label.

    It is `row_tokens`, or a longer sample, as far as `prompt_tokens` says how long one may be; and no more than all
    samples of an update have.
    """
    row = max(config.row_tokens, (config.prompt_tokens or 1) + config.sampling.max_tokens - 1)
    longest = longest_sample(config, shape)
    return row if longest is None else min(row, samples_of_update(config) * (longest - 1))


def samples_of_update(config: GrpoSettings) -> int:
    """Return the most samples of an update."""
    return -(-config.prompts * config.group // config.minibatches)


def bases(plan: ParallelPlan, t: Training) -> list[str]:
    """Return the ways in which the base may be held."""
    if not t.lora.rank:
        return [t.workload.base]
    return [base for base in BASES if not base_has_blocks(plan, replace(t.workload, base=base))]


def needs(config: GrpoSettings, t: Training, adapters: LoraConfig | None = None) -> dict[str, dict[str, Memory]]:
    """Return {base: {"update": Memory, "rollouts": Memory}} of the fullest rank.

    `adapters`: those that the folder of the KL term's model has, None for none.
    """
    return {base: of_base(config, t, base, adapters) for base in bases(config.parallel, t)}


def of_base(config: GrpoSettings, t: Training, base: str, adapters: LoraConfig | None = None) -> dict[str, Memory]:
    """Return {"update": Memory, "rollouts": Memory} of the fullest rank, with the base held so."""
    plan = replace(config.parallel, micro_batch=1)  # a row is a micro-batch
    shape, data = t.known_shape, plan.data(t.workload.ranks)
    rows = samples_of_update(config) * data  # at most: as many on each rank as an update has samples
    t = replace(t, workload=replace(t.workload, pack_length=longest_row(config, shape), global_batch=rows, base=base))
    of_stages = [_of_stage(config, plan, t, stage, adapters) for stage in stages(plan, shape)]
    return {phase: max((of[phase] for of in of_stages), key=lambda one: one.total) for phase in (UPDATE, ROLLOUTS)}


def _of_stage(
    config: GrpoSettings, plan: ParallelPlan, t: Training, stage: Stage, adapters: LoraConfig | None
) -> dict[str, Memory]:
    """Return {"update": Memory, "rollouts": Memory} of one rank of a stage."""
    engine, shape, update = config.engine, t.known_shape, stage_memory(plan, t, stage)
    if loads_reference(config, adapted=adapters is not None):
        beside = weight_bytes(plan, replace(t, lora=adapters or LoraConfig()), stage)
        update = replace(update, weights=update.weights + beside)
    kept = 0.0 if config.offload else 1.0
    drawn = FILTERED_BYTES if config.sampling.is_filtered else DRAWN_BYTES
    columns = padded_rows(shape.vocabulary, plan.tensor) / plan.tensor
    sampling = replace(
        update,
        gradients=kept * update.gradients,
        optimizer=kept * update.optimizer,
        activations=engine.token_budget * layer_activations(replace(plan, recompute="full"), t, stage)[1],
        logits=drawn * engine.max_batch * columns if stage.last else 0.0,
        exchange=engine.token_budget * exchange_bytes(plan, shape),
        kv_cache=_cached(config, plan, t, stage),
    )
    return {UPDATE: update, ROLLOUTS: sampling}


def _cached(config: GrpoSettings, plan: ParallelPlan, t: Training, stage: Stage) -> float:
    """Return the bytes of keys, values and recurrent states that the engine of one rank of a stage takes.

    Blocks are those that engine.kv_gib holds, or fewer that all samples can need (Engine._blocks), and one that is
    nobody's. Slots of states are two for each of max_batch samples, and one that is nobody's.
    """
    engine, shape = config.engine, t.known_shape
    held, most = room(engine, plan, shape, dtype=t.dtype, tokens=1), _most_blocks(config, plan, t)
    attentions, element = stage.blocks[ATTENTION] + stage.blocks[WINDOW], BYTES.get(t.dtype, BYTES["bfloat16"])
    groups = max(1, shape.kv_groups // plan.tensor)
    size = block_bytes(attentions, engine.block_size, groups, head_dim=shape.head_dim, element=element)
    blocks = (held.blocks if most is None else min(held.blocks, most)) + 1
    slots = 2 * engine.max_batch + 1
    parts = plan.tensor * plan.context
    channels = (shape.mamba_inner + 2 * shape.mamba_groups * shape.mamba_state) / parts
    state = STATE_BYTES * shape.mamba_inner * shape.mamba_state / parts
    state += (shape.mamba_conv - 1) * (element * channels + NUMBER_BYTES)
    return (blocks * size if attentions else 0.0) + slots * state * stage.blocks[MAMBA]


def _most_blocks(config: GrpoSettings, plan: ParallelPlan, t: Training) -> int | None:
    """Return the blocks that all samples of a replica can need at once; None where that is not known."""
    longest = longest_sample(config, t.known_shape)
    if longest is None or (config.evaluation.every and config.mix.environments):
        return None
    replicas = plan.data(t.workload.ranks) * plan.context
    asked = [(config.prompts, config.group)]  # of a draw
    if config.evaluation.every:
        held_out = sum(entry.evaluation_only for entry in config.mix.entries.values()) * config.evaluation.prompts
        asked.append((held_out, max(1, config.evaluation.samples)))
    each = -(-longest // config.engine.block_size) + 1
    return max(_holders(prompts, samples, replicas) for prompts, samples in asked) * each


def _holders(prompts: int, samples: int, replicas: int) -> int:
    """Return how many prompts and samples of them a replica holds at most, as they are dealt."""
    own = most_samples(prompts * samples, replicas)
    return own + min(prompts, most_prompts(own, samples))


# ---------------------------------------------------------------- what is refused


def reference_adapter(config: GrpoSettings, site: Site) -> LoraConfig | None:
    """Return the adapters of the folder of the KL term's model, None where it has none or is not known."""
    return model_adapter(config.reference or config.model, site)[1]


def check(config: GrpoSettings, t: Training, site: Site) -> list[Problem]:
    """Refuse what the GPUs have no room for, where model and GPUs are known; one of its settings, else a plan that
    fits is offered."""
    if not refusals.is_reckoned(config.parallel, t, site):
        return []
    adapters = reference_adapter(config, site)
    phases = of_base(config, t, t.workload.base, adapters)
    when, fullest = max(phases.items(), key=lambda item: item[1].total)
    said = {UPDATE: " in an update", ROLLOUTS: " while it samples"}[when]
    return refusals.over(fullest, t, lambda: _remedy(config, t, adapters), said)


def _fullest(config: GrpoSettings, t: Training, adapters: LoraConfig | None) -> Memory:
    """Return the memory of the fullest rank, in its fullest phase."""
    return max(of_base(config, t, config.base, adapters).values(), key=lambda one: one.total)


def _remedy(config: GrpoSettings, t: Training, adapters: LoraConfig | None) -> str:
    """Return the words of a refusal that say what would fit: each setting that is enough, else all of them, else a
    plan on as many GPUs or more."""
    limit = HEADROOM * (t.capacity or 0.0)
    totals = [(name, value, _fullest(other, t, adapters).total) for name, value, other in _changes(config, t, adapters)]
    enough = [f"{name} {value} ({total / GIB:.1f} GiB)" for name, value, total in totals if total <= limit]
    if enough:
        return f"use {' or '.join(enough)}"
    changed, total, given = config, _fullest(config, t, adapters).total, dict[str, str]()
    while total > limit:
        others = (
            (name, value, other, _fullest(other, t, adapters).total)
            for name, value, other in _changes(changed, t, adapters)
        )
        better = next((one for one in others if one[3] < total), None)
        if better is None:
            break
        given[better[0]] = better[1]
        changed, total = better[2:]
    else:
        words = ", ".join(f"{name} {value}" for name, value in given.items())
        return f"use {words} together ({total / GIB:.1f} GiB)"

    def of_plan(plan: ParallelPlan, on: Training) -> Memory:
        return _fullest(replace(config, parallel=plan), on, adapters)

    return offer_text(config.parallel, t, of_plan)


def _changes(config: GrpoSettings, t: Training, adapters: LoraConfig | None) -> Iterator[tuple[str, str, GrpoSettings]]:
    """Yield the settings that save memory: name, value, and the config with it."""
    plan, shape, engine = config.parallel, t.known_shape, config.engine
    if plan.recompute != "full":
        yield "parallel.recompute", "full", replace(config, parallel=replace(plan, recompute="full"))
    if not config.base and MXFP4 in bases(plan, t):
        yield "base", MXFP4, replace(config, base=MXFP4)
    if not config.offload:
        yield "offload", "true", replace(config, offload=True)
    sample = config.prompt_tokens + config.sampling.max_tokens - 1
    if config.prompt_tokens and sample < config.row_tokens:
        yield "row_tokens", str(sample), replace(config, row_tokens=sample)
    rollouts = of_base(config, t, config.base, adapters)[ROLLOUTS]
    spare = rollouts.total - HEADROOM * (t.capacity or 0.0)
    less = int(10 * (min(engine.kv_gib * GIB, rollouts.kv_cache) - spare) / GIB) / 10
    smaller = replace(engine, kv_gib=less)
    tokens = longest_sample(config, shape) if config.prompt_tokens else 1 + config.sampling.max_tokens
    if 0 < less < engine.kv_gib and room(smaller, plan, shape, dtype=t.dtype, tokens=tokens or 1).samples:
        yield "engine.kv_gib", f"{less:g}", replace(config, engine=smaller)


# ---------------------------------------------------------------- what plan shows


def report(config: GrpoSettings, t: Training, site: Site) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Return (facts, tables, notes) of these needs in GiB; nothing while the model is not known."""
    if t.shape is None or not divides(config.parallel, t.workload):
        return {}, [], []
    by_base = needs(config, t, reference_adapter(config, site))
    columns = {
        f"{phase}, base {base or t.dtype}": of for base, phases in by_base.items() for phase, of in phases.items()
    }
    names = [field.name for field in fields(Memory)]
    rows = [
        [name.replace("_", " "), *(f"{getattr(of, name) / GIB:.1f}" for of in columns.values())]
        for name in (*names, "total")
        if any(getattr(of, name) for of in columns.values())
    ]
    size, row = f" of {t.capacity / GIB:.1f}" if t.capacity else "", longest_row(config, t.shape)
    title = f"memory{size} GiB, rows of {row:,} tokens, recompute {config.parallel.recompute}"
    facts = {
        base or t.dtype: {
            phase: {name: getattr(of, name) / GIB for name in (*names, "total")} for phase, of in phases.items()
        }
        for base, phases in by_base.items()
    }
    notes = [] if config.prompt_tokens else [_not_counted(config, t.shape)]
    return {"memory_by_base": facts}, [{"title": title, "columns": ["GiB", *columns], "rows": rows}], notes


def _not_counted(config: GrpoSettings, shape: ModelShape) -> str:
    """Say which rows are not counted where nothing limits the prompts but the model's positions."""
    longest = longest_sample(config, shape)
    most = "as long as it likes" if longest is None else f"of {longest - config.sampling.max_tokens:,} tokens"
    return f"a prompt may be {most}, and make a longer row than is counted: set prompt_tokens"
