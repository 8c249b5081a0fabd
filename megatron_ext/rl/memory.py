"""What a GRPO needs of a GPU: in an update, and while it samples, with keys and values in place of activations.

With adapters also what it would need with its base held otherwise (ModelSettings.base). No torch.
"""

from dataclasses import fields, replace
from typing import Any

from megatron_ext.parallel.calibration import GIB
from megatron_ext.parallel.parts import BASES
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.parallel.rules import base_has_blocks
from megatron_ext.preflight.facts import Training
from megatron_ext.preflight.memory import LOGIT_BYTES, Memory, divides, fuses_gates, layer_activations, memory, stages
from megatron_ext.rl.settings import GrpoSettings


def bases(plan: ParallelPlan, t: Training) -> list[str]:
    """Return the ways in which the base may be held."""
    if not t.lora.rank:
        return [t.workload.base]
    return [base for base in BASES if not base_has_blocks(plan, replace(t.workload, base=base))]


def needs(config: GrpoSettings, t: Training) -> dict[str, dict[str, Memory]]:
    """Return {base: {"update": Memory, "rollouts": Memory}} of the fullest rank."""
    return {base: _needs(config, _of_base(config, t, base)) for base in bases(config.parallel, t)}


def _of_base(config: GrpoSettings, t: Training, base: str) -> Training:
    work = replace(t.workload, pack_length=config.row_tokens, global_batch=1, base=base)
    return replace(t, workload=work)


def _needs(config: GrpoSettings, t: Training) -> dict[str, Memory]:
    plan, engine = config.parallel, config.engine
    update = memory(plan, t)
    if config.reference and config.loss.kl_beta:
        update = replace(update, weights=2 * update.weights)
    kept = 0.0 if config.offload else 1.0
    of_layer = max(
        layer_activations(replace(plan, recompute="full"), t.known_shape, stage, fuses_gates(plan, t.workload))[1]
        for stage in stages(plan, t.known_shape)
    )
    sampling = replace(
        update,
        gradients=kept * update.gradients,
        optimizer=kept * update.optimizer,
        activations=engine.token_budget * of_layer,
        logits=LOGIT_BYTES * engine.max_batch * t.known_shape.vocabulary / plan.tensor,
        kv_cache=engine.kv_gib * GIB,
    )
    return {"update": update, "rollouts": sampling}


def report(config: GrpoSettings, t: Training) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (facts, tables) of these needs in GiB; nothing while the model is not known."""
    if t.shape is None or not divides(config.parallel, t.workload):
        return {}, []
    by_base = needs(config, t)
    columns = {
        f"{phase}, base {base or t.dtype}": of for base, phases in by_base.items() for phase, of in phases.items()
    }
    names = [field.name for field in fields(Memory)]
    rows = [
        [name.replace("_", " "), *(f"{getattr(of, name) / GIB:.1f}" for of in columns.values())]
        for name in (*names, "total")
        if any(getattr(of, name) for of in columns.values())
    ]
    size = f" of {t.capacity / GIB:.1f}" if t.capacity else ""
    title = f"memory{size} GiB, rows of {config.row_tokens:,} tokens, recompute {config.parallel.recompute}"
    facts = {
        base or t.dtype: {
            phase: {name: getattr(of, name) / GIB for name in (*names, "total")} for phase, of in phases.items()
        }
        for base, phases in by_base.items()
    }
    return {"memory_by_base": facts}, [{"title": title, "columns": ["GiB", *columns], "rows": rows}]
