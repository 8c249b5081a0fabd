"""What a run holds beside its pipeline file: the overrides and variables that its newest submission was made with.

A resubmission keeps those of before and adds its own, so that they stay in force until somebody submits the file
without them. `resubmit`, `status` and `plan` say so, and how to go back.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.printing import as_typed
from jobs.artifacts.run_folder import RunFolder
from jobs.schema.pipeline import Pipeline

SHOWN, FEW = 5, 3  # so many overrides are told; of more than SHOWN the first FEW
LONGEST = 240  # characters of overrides in one line


@dataclass(frozen=True)
class Held:
    """One override in force, and the submission that it was first given at."""

    override: str  # KEY=VALUE
    submission: int


def held(run: RunFolder) -> list[Held]:
    """Return the overrides that the newest submission of a run was made with, in their order, variables' first."""
    numbers = run.submissions()
    given = {number: _given(run, number) for number in numbers}
    if not numbers:
        return []
    found = []
    for key, override in given[numbers[-1]].items():
        first = numbers[-1]
        for number in reversed(numbers):
            if given[number].get(key) != override:
                break
            first = number
        found.append(Held(override, first))
    return found


def file_of(run: RunFolder) -> Path | None:
    """Return the pipeline file that a user wrote and submitted, though the newest submission is a resubmission."""
    copies = {str(run.pipeline_path(number)) for number in run.submissions()}
    sources = [_origin(run, number).get("source", "") for number in reversed(run.submissions())]
    return next((Path(source) for source in sources if source and source not in copies), None)


def told(run: RunFolder) -> str:
    """Return which overrides are in force in a run, and how to go back to its file; "" where none is."""
    kept = [f"{shlex.quote(each.override)} (submission {each.submission})" for each in held(run)]
    if not kept:
        return ""
    shown = kept if len(kept) <= SHOWN and len(", ".join(kept)) <= LONGEST else [_cut(text) for text in kept[:FEW]]
    rest = len(kept) - len(shown)
    more = f" and {rest} more (all: `afterok status {as_typed(run.path)} --json`)" if rest else ""
    return f"overrides in force: {', '.join(shown)}{more}; `{_way_back(run)}` drops them"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST // FEW else f"{text[: LONGEST // FEW]}…"


def _way_back(run: RunFolder) -> str:
    """Return the command that makes the pipeline file's own values count again."""
    file, own = file_of(run), Path.cwd() / "runs" / run.pipeline_name(run.newest_submission())
    where = [] if run.path == own else ["--run", as_typed(run.path)]
    return shlex.join(["afterok", "submit", as_typed(file) if file else "PIPELINE", *where])


def remarks(pipeline: Pipeline, run: RunFolder) -> list[str]:
    """Return what `plan` and `submit` say of overrides that the newest submission has and this command leaves out."""
    own = _by_key([*(variable.override for variable in pipeline.variables), *pipeline.overrides])
    missing = [each.override for each in held(run) if _key(each.override) not in own]
    if not missing:
        return []
    return [f"this drops overrides of the run; repeat those that are to stay: {shlex.join(missing)}"]


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
