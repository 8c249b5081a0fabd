"""A rehearsal: the whole graph as it would run, with a sleep in place of each phase's work (jobs/rehearsal.py).

What a rehearsal seals has other keys than the real thing, and lies in a run of its own.
"""

from collections.abc import Mapping
from typing import Any

from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from jobs.schema.pipeline import Phase, Pipeline
from slurm.profile.schema import Resources

MARK = {"rehearsed": True}  # of a key's material
UNLIMITED_S = 3600.0  # planned for a phase whose job has no time limit, such as a local process


def of_phase(pipeline: Pipeline, phase: Phase, resources: Resources, costs: Mapping[str, float]) -> dict[str, Any]:
    """Return the settings of a phase's rehearsal, {} where the pipeline is not rehearsed.

    Its planned time is what its kind predicts (`costs`), else the limit of its job: the most that it can take.
    """
    if not pipeline.rehearsed:
        return {}
    limit_s = 60.0 * resources.time_minutes if resources.time_minutes else UNLIMITED_S
    planned_s = min(limit_s, costs.get("seconds", limit_s))
    return {"seconds": pipeline.rehearsed * planned_s, "stops": phase.kind.can_stop}


def why_not_mixed(pipeline: Pipeline, run: RunFolder) -> str:
    """Return why a rehearsal must not go into a run, or the real thing into one of a rehearsal; "" where it may."""
    numbers = run.submissions()
    try:
        phases = run.frozen(numbers[-1]).values() if numbers else []
    except UserMistake:  # a torn plan, which is told of elsewhere
        return ""
    before = any(phase.rehearsal for phase in phases)
    if not phases or before == bool(pipeline.rehearsed):
        return ""
    if before:
        return f"{run.path} is a rehearsal's: choose another folder with --run DIR, or remove that one"
    return f"{run.path} is a real run: a rehearsal needs a folder of its own, --run DIR"


def remarks(pipeline: Pipeline) -> list[str]:
    """Return what `plan` and `submit` say of a rehearsal."""
    if not pipeline.rehearsed:
        return []
    return [f"a rehearsal: each phase sleeps {pipeline.rehearsed:g} of its planned time or limit, and makes nothing"]
