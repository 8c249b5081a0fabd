"""What a plan costs: GPU-hours of each phase, at most by the time limits, and as planned where that is known."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import mean

from data_tools.mistake import Problem
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from launchers.planning.chain import seconds_a_step
from slurm.profile.schema import Resources

MEASURED, PREDICTED = "measured in this run", "predicted by the plan's step time"


@dataclass(frozen=True)
class GpuHours:
    """GPU-hours of what is to run; None: not known, since a job has no limit, or nobody knows how long it takes."""

    bound: float | None
    planned: float | None


def planned_seconds(run: RunFolder, phase: FrozenPhase, costs: dict[str, float]) -> tuple[float | None, str]:
    """Return (seconds that one element will take, how that is known); (None, "") where nothing tells.

    What this run measured counts before what the phase's kind predicts: steps of its newest lives, else whole elements.
    """
    outcomes = run.outcomes(phase.name)
    told = [outcome for outcome in outcomes if outcome.total]
    step_s = seconds_a_step(told)
    if step_s is not None:
        own = [outcome for outcome in told if outcome.key == phase.key]
        done = max((outcome.done or 0 for outcome in own), default=0)
        return max((own or told)[-1].total or 0, done) * step_s - done * step_s, MEASURED
    if whole := [outcome.ended - outcome.started for outcome in outcomes if outcome.state == "sealed"]:
        return mean(whole), MEASURED
    return (costs["seconds"], PREDICTED) if "seconds" in costs else (None, "")


def gpu_hours(frozen: FrozenPhase, resources: Resources, missing: Collection[int], seconds: float | None) -> GpuHours:
    """Return the GPU-hours of the elements `missing` that a phase is to run; `seconds` are those planned of one."""
    gpus = resources.nodes * resources.gpus_per_node
    if not gpus or not missing:
        return GpuHours(0.0, 0.0)
    tasks = frozen.links or len({element // max(frozen.batch, 1) for element in missing})
    minutes = resources.time_minutes
    return GpuHours(
        None if minutes is None else gpus * tasks * minutes / 60,
        None if seconds is None else gpus * len(missing) * seconds / 3600,
    )


def total(each: Collection[GpuHours]) -> GpuHours:
    """Return the GPU-hours of all phases; None where those of one are not known."""
    bounds, planned = [hours.bound for hours in each], [hours.planned for hours in each]
    return GpuHours(
        None if None in bounds else sum(hours for hours in bounds if hours is not None),
        None if None in planned else sum(hours for hours in planned if hours is not None),
    )


def over_budget(hours: Mapping[str, GpuHours], budget: float | None) -> list[Problem]:
    """Refuse phases (name -> hours) whose time limits cost more GPU-hours than the budget, or that have no limit."""
    if budget is None:
        return []
    if boundless := [name for name, each in hours.items() if each.bound is None]:
        message = f"{', '.join(boundless)} may use any number of GPU-hours: no time limit is said; say resources.time"
        return [Problem("--budget", message, "B001")]
    most = round(total(list(hours.values())).bound or 0.0, 6)  # a sum of minutes, without what floats add to it
    if most <= budget:
        return []
    ranked = sorted(((each.bound or 0.0, name) for name, each in hours.items()), reverse=True)
    each = ", ".join(f"{name} {bound:,.2f}" for bound, name in ranked if bound)
    message = f"the time limits come to {most:,.2f} GPU-hours ({each}), and the budget is {budget}; ask for less "
    return [Problem("--budget", f"{message}time, nodes or GPUs, or raise it", "B001")]
