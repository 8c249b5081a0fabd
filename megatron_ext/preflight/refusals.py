"""What is refused before a training queues: a plan that breaks a rule, or one that does not fit the GPUs' memory."""

from collections.abc import Callable

from data_tools.mistake import Problem
from megatron_ext.parallel import rules
from megatron_ext.parallel.calibration import GIB
from megatron_ext.parallel.plan import ParallelPlan, Site, environment_problems
from megatron_ext.preflight.facts import Training
from megatron_ext.preflight.memory import Memory, divides, memory
from megatron_ext.preflight.search import offer_text


def check(plan: ParallelPlan, t: Training, site: Site) -> list[Problem]:
    """Return every broken rule, and whether the plan does not fit the GPUs, where memory and packs are known."""
    problems = rules.check(plan, t.workload) + environment_problems(plan, site.environment) + check_gpus(site)
    problems += check_dtype(t)
    if t.workload.pack_length and is_reckoned(plan, t, site):
        problems += over(memory(plan, t), t, lambda: offer_text(plan, t))
    return problems


def check_dtype(t: Training) -> list[Problem]:
    """Refuse to train in float16, whose least number is 6e-8: without a scale of the loss, which there is none of,
    gradients below it vanish."""
    if t.dtype != "float16":
        return []
    said = "float16, the type of the weights here, is not trained: gradients below 6e-8 would be 0 without a word"
    return [Problem("dtype", f"{said}; set dtype: bfloat16, or float32")]


def check_gpus(site: Site) -> list[Problem]:
    """Refuse ranks that would share GPUs, which ranks.py refuses once they have started."""
    ranks, gpus = -(-site.ranks // site.nodes), site.gpus_per_node or 0
    if not gpus or ranks <= gpus:
        return []
    said = f"{ranks} ranks of a node have {gpus} GPU{'s' if gpus > 1 else ''}, and each needs its own"
    return [Problem("parallel", f"{said}: set resources.gpus_per_node {ranks}, or ranks_per_node {gpus}")]


def is_reckoned(plan: ParallelPlan, t: Training, site: Site) -> bool:
    """Return whether enough is known of the model and of the phase's GPUs to ask whether it fits them."""
    return bool(t.shape and site.gpus_per_node and t.capacity) and divides(plan, t.workload)


def over(needs: Memory, t: Training, remedy: Callable[[], str], when: str = "") -> list[Problem]:
    """Return the problem of a GPU that has less than the fullest rank needs; `when` says what it does then."""
    if t.capacity is None or needs.total <= t.capacity:
        return []
    parts = {"state": needs.state, "activations": needs.activations, "logits": needs.logits}
    parts |= {"keys and values": needs.kv_cache} if needs.kv_cache else {}
    parts["other"] = needs.total - sum(parts.values())
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    shortage = f"needs {needs.total / GIB:.1f} GiB a GPU{when} ({listed}), and a GPU has {t.capacity / GIB:.1f}"
    return [Problem("parallel", f"{shortage}: {remedy()}")]
