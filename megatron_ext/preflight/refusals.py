"""What is refused before a training queues: a plan that breaks a rule, or one that does not fit the GPUs' memory."""

from data_tools.mistake import Problem
from megatron_ext.parallel import rules
from megatron_ext.parallel.calibration import GIB
from megatron_ext.parallel.plan import ParallelPlan, Site, environment_problems
from megatron_ext.preflight.facts import Training
from megatron_ext.preflight.memory import Memory, divides, memory
from megatron_ext.preflight.search import offer_text


def check(plan: ParallelPlan, t: Training, site: Site) -> list[Problem]:
    """Return every broken rule, and whether the plan does not fit the GPUs, where their memory is known."""
    problems = rules.check(plan, t.workload) + environment_problems(plan, site.environment)
    known = t.workload.shape and t.workload.pack_length and site.gpus_per_node
    capacity = t.capacity
    if known and capacity and divides(plan, t.workload):
        needs = memory(plan, t)
        if needs.total > capacity:
            problems.append(Problem("parallel", f"{_shortage(needs, capacity)}: {offer_text(plan, t)}"))
    return problems


def _shortage(needs: Memory, capacity: float) -> str:
    rest = needs.total - needs.state - needs.activations - needs.logits
    parts = {"state": needs.state, "activations": needs.activations, "logits": needs.logits, "other": rest}
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    return f"needs {needs.total / GIB:.1f} GiB a GPU ({listed}), and a GPU has {capacity / GIB:.1f}"
