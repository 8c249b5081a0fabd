"""What a submission writes down before its first step: the code, pipeline and profile it was made of, and its plan.

What its jobs run never depends on what the user edits meanwhile.
"""

import os
import secrets
from pathlib import Path
from typing import Any

from data_tools.base import durable
from jobs.artifacts.run_folder import RunFolder
from jobs.kind import user_code
from launchers.planning.ledger import Ledger
from launchers.planning.plan import Plan
from launchers.planning.snapshot import take_snapshot
from slurm.dev.cluster import prefix_of
from slurm.profile.files import to_yaml


def next_number(run: RunFolder) -> int:
    """Return the number of a new submission: one more than the highest, though that was killed before it had a plan."""
    return max(run.submission_numbers(), default=0) + 1


def job_name(run: RunFolder, phase: str, number: int, token: str = "") -> str:
    """Return a name for the job of a phase, the phase first, since `squeue` shows few characters of it.

    The token tells it from every other job; without one it is drawn.
    """
    return f"{phase}.{run.name}.a{number}.{token or secrets.token_hex(4)}"


def is_newest(plan: Plan) -> bool:
    """Return whether the newest submission is of the plan's phases under the plan's keys."""
    numbers = plan.run.submissions()
    newest = plan.run.frozen(numbers[-1]) if numbers else {}
    return {name: phase.key for name, phase in newest.items()} == {p.name: p.frozen.key for p in plan.phases}


def freeze(plan: Plan, number: int) -> None:
    """Write everything that a submission's jobs will read."""
    run = plan.run
    run.submission_folder(number).mkdir(parents=True)
    roots = [root for phase in plan.pipeline.phases.values() for root in user_code(phase.uses, phase.config)]
    take_snapshot(run.code_folder(number), run.shared_code_folder, roots)
    durable.write_checked(
        run.pipeline_origin_path(number),
        {
            "source": plan.pipeline.source,
            "overrides": plan.pipeline.overrides,
            "variables": {variable.name: variable.override for variable in plan.pipeline.variables},
            "params": plan.pipeline.params,
            "waive": plan.pipeline.waive,
            "cwd": os.getcwd(),
            **({"rehearsed": plan.pipeline.rehearsed} if plan.pipeline.rehearsed else {}),
        },
    )
    durable.write_file(run.pipeline_path(number), Path(plan.pipeline.source).read_bytes())
    durable.write_file(run.profile_path(number), to_yaml(plan.cluster.profile))
    run.meeting_key(number)
    run.freeze(number, plan.pipeline.name, [phase.frozen for phase in plan.phases])


def opening(plan: Plan, number: int) -> dict[str, Any]:
    """Return what the ledger's first line about a submission says: where it goes, of a dev cluster the prefix too, and
    the run's place."""
    prefix = prefix_of(Path(plan.cluster.env.get("SLURM_CONF", "")))
    return {
        "submission": number,
        "backend": "slurm" if plan.cluster.kind == "slurm" else "local",
        "choice": plan.pipeline.cluster,
        "cluster": plan.cluster.name,
        "cluster_name": plan.cluster.slurm_name,
        "profile": plan.cluster.profile.meta.name,
        "profile_file": plan.cluster.profile_file,
        "run": str(plan.run.path.resolve()),
        **({"prefix": str(prefix)} if prefix is not None else {}),
    }


def open_submission(plan: Plan, number: int) -> None:
    """Write the submission's first line into the ledger."""
    Ledger(plan.run.ledger).append("submission", **opening(plan, number))


def select(plan: Plan, number: int) -> int:
    """Write down a submission without jobs, and return its number: its phases are sealed, or under way already."""
    freeze(plan, number)
    open_submission(plan, number)
    Ledger(plan.run.ledger).append("released", submission=number)
    return number
