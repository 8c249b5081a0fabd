"""What a run holds beside its pipeline file: the overrides and variables that its newest submission was made with.

A resubmission keeps those of before and adds its own, so that they stay in force until somebody submits the file
without them. `resubmit`, `status` and `plan` say so, and how to go back.
"""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.base import durable
from jobs.artifacts.run_folder import RunFolder
from jobs.schema.pipeline import Pipeline
from launchers.planning.ledger import Ledger


@dataclass(frozen=True)
class Held:
    """One override in force, and the submission that it was first given at."""

    override: str  # KEY=VALUE
    submission: int
    given_at: float | None  # seconds since the epoch, by the submitting host's clock; None: of a run of before


def _spelled(kept: list[Held]) -> str:
    """Return overrides in words, those of one submission together."""
    told = []
    for number in sorted({each.submission for each in kept}):
        own = [each for each in kept if each.submission == number]
        given_at = own[0].given_at
        when = time.strftime(", %Y-%m-%d %H:%M", time.localtime(given_at)) if given_at else ""
        told.append(f"{' '.join(each.override for each in own)} (submission {number}{when})")
    return "; ".join(told)


def held(run: RunFolder) -> list[Held]:
    """Return the overrides that the newest submission of a run was made with, in their order, variables' first."""
    numbers = run.submissions()
    given = {number: _given(run, number) for number in numbers}
    if not numbers:
        return []
    times = {event["submission"]: event.get("time") for event in Ledger(run.ledger).events()
             if event["event"] == "submission"}  # fmt: skip
    found = []
    for key, override in given[numbers[-1]].items():
        first = numbers[-1]
        for number in reversed(numbers):
            if given[number].get(key) != override:
                break
            first = number
        found.append(Held(override, first, times.get(first)))
    return found


def file_of(run: RunFolder) -> Path | None:
    """Return the pipeline file that a user wrote and submitted, though the newest submission is a resubmission."""
    copies = {str(run.pipeline_path(number)) for number in run.submissions()}
    sources = [_origin(run, number).get("source", "") for number in reversed(run.submissions())]
    return next((Path(source) for source in sources if source and source not in copies), None)


def told(run: RunFolder) -> str:
    """Return which overrides are in force in a run, and how to go back to its file; "" where none is."""
    kept = held(run)
    if not kept:
        return ""
    return f"in force beside the pipeline file: {_spelled(kept)}. {way_back(run)}"


def way_back(run: RunFolder) -> str:
    """Return how to make the pipeline file's own values count again."""
    file = file_of(run)
    command = shlex.join(["afterok", "submit", str(file) if file else "PIPELINE", "--run", str(run.path)])
    return f"`{command}` without them goes back to the file's values"


def remarks(pipeline: Pipeline, run: RunFolder) -> list[str]:
    """Return what `plan` and `submit` say of overrides that the newest submission has and this command leaves out."""
    own = _by_key([*(variable.override for variable in pipeline.variables), *pipeline.overrides])
    missing = [each for each in held(run) if _key(each.override) not in own]
    if not missing:
        return []
    words = shlex.join(each.override for each in missing)
    return [
        f"the run holds {_spelled(missing)}, which this command leaves out: what they changed goes back to "
        f"the file's values. To keep them, add {words}"
    ]


def _origin(run: RunFolder, number: int) -> dict[str, Any]:
    try:
        return durable.read_checked(run.pipeline_origin_path(number))
    except (OSError, durable.TornFile):  # a run of before, or one whose damage is told elsewhere
        return {}


def _given(run: RunFolder, number: int) -> dict[str, str]:
    """Return {key: override} of a submission, but for the choice of the cluster, which the run keeps to anyway."""
    origin = _origin(run, number)
    return _by_key([*origin.get("variables", {}).values(), *origin.get("overrides", [])])


def _by_key(overrides: list[str]) -> dict[str, str]:
    """Return {key: the override that counts}, the last one of a key."""
    return {_key(override): override for override in overrides if _key(override).partition(".")[0] != "cluster"}


def _key(override: str) -> str:
    return override.partition("=")[0]
