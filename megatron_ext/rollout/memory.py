"""What sampling needs of a GPU: weights, keys and values in place of activations, the logits of the samples.

Of GRPO (rl/memory.py) and of `generate` and `evaluate`, which train nothing: what does not fit the GPUs is refused,
with the settings that would make it fit. Derived, as in preflight/memory.py; nothing was measured. No torch.

    samples        weights; keys and values (at most engine.kv_gib) and recurrent states; activations of one pass,
                   logits of the samples that are decoded together
    likelihoods    weights; activations and logits of rows of engine.token_budget tokens, where choices are compared
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from data_tools.mistake import Problem
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel.calibration import GIB
from megatron_ext.parallel.parts import BASES, MXFP4
from megatron_ext.parallel.plan import ParallelPlan, Site, padded_rows
from megatron_ext.parallel.rules import base_has_blocks, base_is_held_by_ours
from megatron_ext.parallel.shape import ATTENTION, MAMBA, WINDOW, ModelShape
from megatron_ext.preflight import facts, refusals, remedies
from megatron_ext.preflight.facts import Training
from megatron_ext.preflight.memory import (
    Memory,
    Stage,
    dequantised_bytes,
    exchange_bytes,
    layer_activations,
    loss_head_bytes,
    stages,
    weight_bytes,
)
from megatron_ext.preflight.search import MemoryOf
from megatron_ext.rollout.room import BYTES, block_bytes, room
from megatron_ext.rollout.settings import EngineConfig, RolloutSettings, Sampling

# A logit of a sample while its token is drawn (rollout/sampler.py): the model's and those stacked in bf16, in fp32, its
# weight in fp32, and in fp64 the weight and its running sum. With filters also what is kept and the digits of its bits.
DRAWN_BYTES, FILTERED_BYTES = 2 + 2 + 4 + 4 + 8 + 8, 2 + 2 + 4 + 4 + 4 + 8 + 4 + 1 + 8 + 8
STATE_BYTES, NUMBER_BYTES = 4, 8  # a value of a recurrent state, in fp32; the number of a document
SAMPLES, LIKELIHOODS = "samples", "likelihoods"
C = TypeVar("C", bound=RolloutSettings)


@dataclass(frozen=True)
class Draws:
    """What is sampled at a time: how, and (prompts, samples of each) over all replicas; `asked` () is not known.
    Several are one after the other."""

    sampling: Sampling
    asked: tuple[tuple[int, int], ...] = ()


def longest_sample(config: RolloutSettings, new: int, shape: ModelShape) -> int | None:
    """Return the most tokens of a prompt with its `new` ones; None where nothing limits the prompt."""
    if config.prompt_tokens:
        return config.prompt_tokens + new
    return shape.max_positions or None


def of_replica(draws: Draws, plan: ParallelPlan, ranks: int) -> list[tuple[int, int]]:
    """Return (prompts, samples of each) that a replica, which has an engine of its own, draws at a time."""
    replicas = plan.data(ranks) * plan.context
    return [(-(-prompts // replicas), samples) for prompts, samples in draws.asked]


def while_sampling(config: RolloutSettings, draws: Draws, t: Training, stage: Stage) -> Memory:
    """Return the memory of one rank of a stage while it samples, without what is trained."""
    plan, shape = config.parallel, t.known_shape
    drawn = FILTERED_BYTES if draws.sampling.is_filtered else DRAWN_BYTES
    columns = padded_rows(shape.vocabulary, plan.tensor) / plan.tensor
    rows, tokens = of_pass(config, draws, t)
    return Memory(
        weights=weight_bytes(plan, t, stage),
        gradients=0.0,
        optimizer=0.0,
        activations=tokens * layer_activations(replace(plan, recompute="full"), t, stage)[1],
        logits=drawn * rows * columns if stage.last else 0.0,
        exchange=tokens * exchange_bytes(plan, shape),
        kv_cache=_cached(config, draws, t, stage),
        dequantised=dequantised_bytes(plan, t, stage),
    )


def of_pass(config: RolloutSettings, draws: Draws, t: Training) -> tuple[int, int]:
    """Return (samples, tokens) of a pass at the most: as the engine may, and no more than there are to sample."""
    rows, tokens = config.engine.max_batch, config.engine.token_budget
    asked = of_replica(draws, config.parallel, t.workload.ranks)
    if asked:
        rows = min(rows, max(prompts * samples for prompts, samples in asked))
    longest = longest_sample(config, draws.sampling.max_tokens, t.known_shape)
    if asked and longest:
        tokens = min(tokens, (max(prompts for prompts, _ in asked) + rows) * longest)
    return rows, tokens


def _cached(config: RolloutSettings, draws: Draws, t: Training, stage: Stage) -> float:
    """Return the bytes of keys, values and recurrent states that the engine of one rank of a stage takes.

    Blocks are those that engine.kv_gib holds, or fewer that all samples can need (Engine._blocks), and one that is
    nobody's. Slots of states are two for each of max_batch samples, and one that is nobody's.
    """
    plan, engine, shape = config.parallel, config.engine, t.known_shape
    held, most = room(engine, plan, shape, dtype=t.dtype, tokens=1), _most_blocks(config, draws, t)
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


def _most_blocks(config: RolloutSettings, draws: Draws, t: Training) -> int | None:
    """Return the blocks that all samples of a replica can need at once; None where that is not known."""
    longest = longest_sample(config, draws.sampling.max_tokens, t.known_shape)
    if longest is None or not draws.asked:
        return None
    each = -(-longest // config.engine.block_size) + 1
    asked = of_replica(draws, config.parallel, t.workload.ranks)
    return max(prompts * (samples + 1) * each for prompts, samples in asked)


# ---------------------------------------------------------------- settings that save memory


def smaller_engines(
    config: C, t: Training, needs_of: Callable[[C], Memory], tokens: int
) -> Iterator[tuple[str, str, C]]:
    """Yield (setting, value, the config with it) of each of the engine's settings that is enough by itself.

    Args:
        needs_of: the memory of sampling, or of comparing choices, with a config.
        tokens: of the longest sample, for one of which there must be room.
    """
    engine, needed, limit = config.engine, needs_of(config), remedies.limit(t)
    spare = needed.total - limit
    if spare <= 0:
        return
    less = int(10 * (min(engine.kv_gib * GIB, needed.kv_cache) - spare) / GIB) / 10
    smaller = replace(engine, kv_gib=less)
    if 0 < less < engine.kv_gib and room(smaller, config.parallel, t.known_shape, dtype=t.dtype, tokens=tokens).samples:
        yield "engine.kv_gib", f"{less:g}", replace(config, engine=smaller)
    for name, least in (("max_batch", 1), ("token_budget", engine.max_batch)):
        value = getattr(engine, name) // 2
        while value >= least:
            changed = replace(config, engine=replace(engine, **{name: value}))
            if needs_of(changed).total <= limit:
                yield f"engine.{name}", str(value), changed
                break
            value //= 2


def lean_engine(config: C, t: Training, tokens: int) -> Iterator[tuple[str, str, C]]:
    """Yield (setting, value, the config with it and those before) of an engine that takes no more than the default one,
    but for room for one sample of so many tokens."""
    shape, engine, plain = t.known_shape, config.engine, EngineConfig()
    one = replace(engine, kv_gib=1.0)
    held = room(one, config.parallel, shape, dtype=t.dtype, tokens=tokens)
    needed = plain.kv_gib if held.samples else -(-10 * (held.each + 2) // (held.blocks + 1)) / 10
    values: dict[str, Any] = {"kv_gib": needed, "max_batch": plain.max_batch, "token_budget": plain.token_budget}
    for name, value in values.items():
        if value < getattr(engine, name):
            engine = replace(engine, **{name: value})
            yield f"engine.{name}", f"{value:g}", replace(config, engine=engine)


def bases(plan: ParallelPlan, t: Training) -> list[str]:
    """Return the ways in which the base may be held: as it is asked for, or below adapters each that has its blocks."""
    if not t.lora.rank:
        return [t.workload.base]
    held = ((base, replace(t.workload, base=base)) for base in BASES)
    return [base for base, work in held if not (base_has_blocks(plan, work) or base_is_held_by_ours(plan, work))]


# ---------------------------------------------------------------- phases that train nothing


@dataclass(frozen=True)
class Forward:
    """What a phase does with its model that trains nothing: what it samples, one after the other, and whether it
    compares choices."""

    draws: tuple[Draws, ...]
    compares: bool = False


def needs(config: RolloutSettings, work: Forward, t: Training) -> dict[str, Memory]:
    """Return {"samples": Memory, "likelihoods": Memory} of the fullest rank, of what it does."""
    t = replace(t, workload=replace(t.workload, base=config.base))
    held = stages(config.parallel, t.known_shape)
    found = {}
    if work.draws:
        each = [while_sampling(config, draws, t, stage) for draws in work.draws for stage in held]
        found[SAMPLES] = max(each, key=lambda one: one.total)
    if work.compares:
        found[LIKELIHOODS] = max((_comparing(config, t, stage) for stage in held), key=lambda one: one.total)
    return found


def _comparing(config: RolloutSettings, t: Training, stage: Stage) -> Memory:
    """Return the memory of one rank of a stage while it compares choices, in rows of engine.token_budget tokens."""
    plan, shape = config.parallel, t.known_shape
    tokens = config.engine.token_budget / plan.context
    return Memory(
        weights=weight_bytes(plan, t, stage),
        gradients=0.0,
        optimizer=0.0,
        activations=tokens * layer_activations(replace(plan, recompute="full"), t, stage)[1],
        logits=loss_head_bytes(plan, shape, tokens, frozen=True) if stage.last else 0.0,
        exchange=tokens * exchange_bytes(plan, shape),
        dequantised=dequantised_bytes(plan, t, stage),
    )


def check(config: C, work: Forward, site: Site) -> list[Problem]:
    """Refuse a phase that trains nothing where the GPUs are too few, or have no room for it, as far as model and GPUs
    are known; one of its settings, else a plan that fits is offered."""
    shared, adapter = refusals.check_gpus(site), facts.model_adapter(config.model, site)[1]
    t = replace(facts.forward(config, site), lora=adapter or LoraConfig())
    t = replace(t, workload=replace(t.workload, pack_length=None, global_batch=None))
    if not refusals.is_reckoned(config.parallel, t, site) or not (work.draws or work.compares):
        return shared

    def changes(changed: C) -> Iterator[tuple[str, str, C]]:
        yield from _changes(changed, work, t)

    def of_plan(changed: C) -> MemoryOf:
        return lambda plan, on: _fullest(replace(changed, parallel=plan), work, on)

    def lean(changed: C) -> Iterator[tuple[str, str, C]]:
        if not changed.base and MXFP4 in bases(changed.parallel, t):
            changed = replace(changed, base=MXFP4)
            yield "base", MXFP4, changed
        yield from lean_engine(changed, t, _longest(changed, work, t))

    when, most = max(needs(config, work, t).items(), key=lambda item: item[1].total)
    said = {SAMPLES: " while it samples", LIKELIHOODS: " while it compares choices"}[when]

    def remedy() -> str:
        words = remedies.told(config, t, lambda changed: _fullest(changed, work, t).total, changes)
        return words or remedies.plans(config, t, of_plan, lean)

    return shared + refusals.over(most, t, remedy, said)


def _fullest(config: RolloutSettings, work: Forward, t: Training) -> Memory:
    """Return the memory of the fullest rank, in its fullest phase."""
    return max(needs(config, work, t).values(), key=lambda one: one.total)


def _changes(config: C, work: Forward, t: Training) -> Iterator[tuple[str, str, C]]:
    """Yield the settings that save memory: name, value, and the config with it."""
    if not config.base and MXFP4 in bases(config.parallel, t):
        yield "base", MXFP4, replace(config, base=MXFP4)
    yield from smaller_engines(config, t, lambda changed: _fullest(changed, work, t), _longest(config, work, t))


def _longest(config: RolloutSettings, work: Forward, t: Training) -> int:
    return max((longest_known(config, draws, t) for draws in work.draws), default=1)


def longest_known(config: RolloutSettings, draws: Draws, t: Training) -> int:
    """Return the tokens of the longest sample that memory must hold: with `prompt_tokens` of theirs, else of one."""
    new = draws.sampling.max_tokens
    return (longest_sample(config, new, t.known_shape) if config.prompt_tokens else 1 + new) or 1
