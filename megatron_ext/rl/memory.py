"""What a GRPO needs of a GPU: in an update, and while it samples, with keys and values in place of activations.

With adapters also what it would need with its base held otherwise (ModelSettings.base). What does not fit the GPUs is
refused, with the settings that would make it fit. Derived, as in preflight/memory.py; nothing was measured. No torch.

    update     weights, gradients and optimizer of what is trained, activations and logits of the longest row
    rollouts   the same weights; gradients and optimizer unless `offload` is on; keys and values (at most
               engine.kv_gib) and recurrent states; activations of one pass, logits of max_batch samples
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from data_tools.mistake import Problem
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel import rules
from megatron_ext.parallel.calibration import GIB
from megatron_ext.parallel.parts import MXFP4
from megatron_ext.parallel.plan import Site
from megatron_ext.parallel.shape import ModelShape
from megatron_ext.preflight import facts, refusals, remedies
from megatron_ext.preflight.facts import Training
from megatron_ext.preflight.memory import Memory, Stage, divides, stage_memory, stages, weight_bytes
from megatron_ext.preflight.search import MemoryOf
from megatron_ext.rl.settings import GrpoSettings, loads_reference
from megatron_ext.rollout.memory import (
    Draws,
    bases,
    lean_engine,
    longest_known,
    longest_sample,
    smaller_engines,
    while_sampling,
)

UPDATE, ROLLOUTS = "update", "rollouts"


@dataclass(frozen=True)
class Beside:
    """The KL term's model, as far as it is known: the adapters of its folder, None for none; shape and dtype where they
    are others than those of the model in training."""

    lora: LoraConfig | None = None
    shape: ModelShape | None = None
    dtype: str = ""


def longest_row(config: GrpoSettings, shape: ModelShape) -> int:
    """Return the tokens of the longest row that is trained. A sample's last token is only a label.

    It is `row_tokens`, or a longer sample, as far as `prompt_tokens` says how long one may be; and no more than all
    samples of an update have.
    """
    row = max(config.row_tokens, (config.prompt_tokens or 1) + config.sampling.max_tokens - 1)
    longest = longest_sample(config, config.sampling.max_tokens, shape)
    return row if longest is None else min(row, samples_of_update(config) * (longest - 1))


def samples_of_update(config: GrpoSettings) -> int:
    """Return the most samples of an update."""
    return -(-config.prompts * config.group // config.minibatches)


def needs(config: GrpoSettings, t: Training, beside: Beside = Beside()) -> dict[str, dict[str, Memory]]:
    """Return {base: {"update": Memory, "rollouts": Memory}} of the fullest rank. `beside`: the KL term's model."""
    return {base: of_base(config, t, base, beside) for base in bases(config.parallel, t)}


def of_base(config: GrpoSettings, t: Training, base: str, beside: Beside = Beside()) -> dict[str, Memory]:
    """Return {"update": Memory, "rollouts": Memory} of the fullest rank, with the base held so."""
    plan = replace(config.parallel, micro_batch=1)  # a row is a micro-batch
    shape, data = t.known_shape, plan.data(t.workload.ranks)
    rows = samples_of_update(config) * data  # at most: as many on each rank as an update has samples
    t = replace(t, workload=replace(t.workload, pack_length=longest_row(config, shape), global_batch=rows, base=base))
    of_stages = [_of_stage(config, t, stage, beside) for stage in stages(plan, shape)]
    return {phase: max((of[phase] for of in of_stages), key=lambda one: one.total) for phase in (UPDATE, ROLLOUTS)}


def _of_stage(config: GrpoSettings, t: Training, stage: Stage, beside: Beside) -> dict[str, Memory]:
    """Return {"update": Memory, "rollouts": Memory} of one rank of a stage."""
    plan = replace(config.parallel, micro_batch=1)
    update = stage_memory(plan, t, stage)
    reference = _reference_bytes(config, t, stage, beside)
    kept = 0.0 if config.offload else 1.0
    sampling = while_sampling(config, draws(config), t, stage)
    return {
        UPDATE: replace(update, weights=update.weights + reference),
        ROLLOUTS: replace(
            sampling,
            weights=sampling.weights + reference,
            gradients=kept * update.gradients,
            optimizer=kept * update.optimizer,
        ),
    }


def _reference_bytes(config: GrpoSettings, t: Training, stage: Stage, beside: Beside) -> float:
    """Return the bytes of the KL term's model on one rank of a stage; 0 where it is the one below new adapters."""
    if not loads_reference(config, adapted=beside.lora is not None):
        return 0.0
    work = replace(t.workload, shape=beside.shape or t.known_shape)
    own = replace(t, workload=work, lora=beside.lora or LoraConfig(), dtype=beside.dtype or t.dtype)
    if not divides(config.parallel, work):  # which check_reference refuses
        return 0.0
    return weight_bytes(config.parallel, own, stages(config.parallel, own.known_shape)[stage.number])


def draws(config: GrpoSettings) -> Draws:
    """Return what is sampled at a time: a step's prompts, and those of an evaluation in the loop."""
    if config.evaluation.every and config.mix.environments:
        return Draws(config.sampling)
    asked = [(config.prompts, config.group)]
    if config.evaluation.every:
        held_out = sum(entry.evaluation_only for entry in config.mix.entries.values()) * config.evaluation.prompts
        asked.append((held_out, max(1, config.evaluation.samples)))
    return Draws(config.sampling, tuple(asked))


# ---------------------------------------------------------------- what is refused


def reference(config: GrpoSettings, t: Training, site: Site) -> Beside:
    """Return what is known of the KL term's model."""
    lora = facts.model_adapter(config.reference or config.model, site)[1]
    if not config.reference:
        return Beside(lora)
    other = facts.forward(replace(config, model=config.reference), site)
    return Beside(lora, other.shape, other.dtype) if other.shape else Beside(lora)


def check_reference(config: GrpoSettings, t: Training, site: Site) -> list[Problem]:
    """Refuse a plan under which the KL term's model cannot be cut, where it is of another shape than the model."""
    shape = reference(config, t, site).shape if config.loss.kl_beta else None
    if shape is None or shape == t.shape:
        return []
    problems = rules.check(config.parallel, replace(t.workload, shape=shape))
    own = {problem.message for problem in rules.check(config.parallel, t.workload)}
    return [Problem(one.where, f"the KL term's model, {config.reference}: {one.message}") for one in problems
            if one.message not in own]  # fmt: skip


def check(config: GrpoSettings, t: Training, site: Site) -> list[Problem]:
    """Refuse what the GPUs have no room for, where model and GPUs are known; one of its settings, else a plan that
    fits is offered."""
    problems = check_reference(config, t, site)
    if not refusals.is_reckoned(config.parallel, t, site):
        return problems
    beside = reference(config, t, site)
    phases = of_base(config, t, t.workload.base, beside)
    when, fullest = max(phases.items(), key=lambda item: item[1].total)
    said = {UPDATE: " in an update", ROLLOUTS: " while it samples"}[when]
    return problems + refusals.over(fullest, t, lambda: _remedy(config, t, beside), said)


def _fullest(config: GrpoSettings, t: Training, beside: Beside) -> Memory:
    """Return the memory of the fullest rank, in its fullest phase."""
    return max(of_base(config, t, config.base, beside).values(), key=lambda one: one.total)


def _remedy(config: GrpoSettings, t: Training, beside: Beside) -> str:
    """Return the words of a refusal that say what would fit: settings, else a plan on as many GPUs or more."""

    def of_plan(changed: GrpoSettings) -> MemoryOf:
        return lambda plan, on: _fullest(replace(changed, parallel=plan), on, beside)

    def total(changed: GrpoSettings) -> float:
        return _fullest(changed, t, beside).total

    words = remedies.told(config, t, total, lambda changed: _changes(changed, t, beside))
    return words or remedies.plans(config, t, of_plan, lambda changed: _lean(changed, t))


def _changes(config: GrpoSettings, t: Training, beside: Beside) -> Iterator[tuple[str, str, GrpoSettings]]:
    """Yield the settings that save memory: name, value, and the config with it."""
    if config.parallel.recompute != "full":
        yield "parallel.recompute", "full", replace(config, parallel=replace(config.parallel, recompute="full"))
    for name, value in _smaller(config, t).items():
        yield name, str(value).lower(), replace(config, **{name: value})

    def rollouts(changed: GrpoSettings) -> Memory:
        return of_base(changed, t, changed.base, beside)[ROLLOUTS]

    yield from smaller_engines(config, t, rollouts, longest_known(config, draws(config), t))


def _smaller(config: GrpoSettings, t: Training) -> dict[str, Any]:
    """Return the values of settings that save memory under any plan."""
    found: dict[str, Any] = {}
    if not config.base and MXFP4 in bases(config.parallel, t):
        found["base"] = MXFP4
    if not config.offload:
        found["offload"] = True
    sample = config.prompt_tokens + config.sampling.max_tokens - 1
    if config.prompt_tokens and sample < config.row_tokens:
        found["row_tokens"] = sample
    return found


def _lean(config: GrpoSettings, t: Training) -> Iterator[tuple[str, str, GrpoSettings]]:
    """Yield all of them, one upon the other: name, value, and the config with those until there."""
    for name, value in _smaller(config, t).items():
        config = replace(config, **{name: value})
        yield name, str(value).lower(), config
    yield from lean_engine(config, t, longest_known(config, draws(config), t))


# ---------------------------------------------------------------- what plan shows


def report(config: GrpoSettings, t: Training, site: Site) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Return (facts, tables, notes) of these needs in GiB; nothing while the model is not known."""
    if t.shape is None or not divides(config.parallel, t.workload):
        return {}, [], []
    by_base = needs(config, t, reference(config, t, site))
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
    longest = longest_sample(config, config.sampling.max_tokens, shape)
    most = "as long as it likes" if longest is None else f"of {longest - config.sampling.max_tokens:,} tokens"
    return f"a prompt may be {most}, and make a longer row than is counted: set prompt_tokens"
