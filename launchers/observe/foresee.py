"""What `plan` says of jobs that are not sent yet: their scripts, when they would start, and how they differ from those
of a run that was submitted before.
"""

from dataclasses import asdict, dataclass

import yaml

from data_tools.base.yaml_loaders import TextLoader
from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.kind import user_code
from launchers.backends.contract import JobSpec
from launchers.causes.states import PENDING
from launchers.planning.ledger import Ledger
from launchers.planning.plan import Plan, PlannedPhase
from launchers.planning.reasons import changed_settings
from launchers.planning.snapshot import code_changes, code_digests, find_code
from launchers.submission.freeze import job_name, next_number
from slurm.client import SlurmError
from slurm.profile.files import to_yaml
from slurm.profile.layers import leaves, read_values

TOKEN = "TOKEN"  # in place of what makes a job's name its own
OF_A_SUBMISSION = ("job-name", "output", "chdir", "array")  # options that differ from one submission to the next
SIZES = ("array", "throttle", "needs", "role", "image")  # of a frozen phase, beside what its script says


@dataclass(frozen=True)
class Difference:
    """One thing in which a plan differs from what was submitted."""

    phase: str
    what: str  # phase, settings, resources, inputs, code, profile
    line: str


def scripts(plan: Plan) -> dict[str, str]:
    """Return {phase: the batch script} of all that would run.

    Raises:
        UserMistake: local processes have none.
    """
    if plan.cluster.kind != "slurm":
        raise UserMistake(f"{plan.cluster.name}: local processes have no batch script; choose a cluster (cluster=...)")
    return {planned.name: _script(plan, planned) for planned in plan.to_run}


def _script(plan: Plan, planned: PlannedPhase) -> str:
    from launchers.backends.slurm_script import phase_script  # here, so that a local plan does not wait for submitit

    number = next_number(plan.run)
    name = job_name(plan.run, planned.name, number, TOKEN)
    spec = JobSpec(planned, name=name, elements=planned.missing, needs={}, links=planned.frozen.links)
    return phase_script(plan.cluster.profile, plan.run, number, spec)


def predicted_starts(plan: Plan) -> dict[str, str]:
    """Return {phase: when Slurm would start it}, of jobs that wait already and of those that wait for no other phase.

    Slurm says nothing of jobs with dependencies, and nothing is asked where none is configured.
    """
    cluster, starts = plan.cluster, dict[str, str]()
    if cluster.kind != "slurm" or cluster.unasked:
        return starts
    running = {planned.name for planned in plan.to_run}
    try:
        waiting = {row.array_job_id or row.job_id for row in cluster.slurm.queue(False) if row.state == PENDING}
    except SlurmError:
        return starts
    sent = {entry.phase: entry.job for entry in Ledger(plan.run.ledger).own_jobs() if entry.job in waiting}
    for planned in plan.to_run:
        try:
            if planned.name in sent:
                start = cluster.slurm.expected_start(sent[planned.name])
            elif running.isdisjoint(planned.frozen.needs):
                start = cluster.slurm.predicted_start(_script(plan, planned))
            else:
                continue
        except SlurmError:
            continue  # it is a prediction: what would be refused is told by the checks
        if start:
            starts[planned.name] = start
    return starts


def differences(plan: Plan, run: RunFolder) -> list[Difference]:
    """Return in what a plan differs from the newest submission of a run."""
    number = run.newest_submission()
    before = run.frozen(number)
    code = find_code(root for phase in plan.pipeline.phases.values() for root in user_code(phase.uses, phase.config))
    digests, found = code_digests(code), list[Difference]()
    for planned in plan.phases:
        name = planned.name
        if name not in before:
            found.append(Difference(name, "phase", f"not in submission {number}"))
            continue
        was, now = before[name], planned.frozen
        found += [Difference(name, "settings", line) for line in _settings(was, now)]
        found += [Difference(name, "resources", line) for line in _resources(plan, planned, was, run, number)]
        found += [Difference(name, "inputs", line) for line in _inputs(was, now)]
        phase = plan.pipeline.phases[name]
        files = code_changes(run.code_folder(number), phase.uses, phase.config, code=code, digests=digests)
        found += [Difference(name, "code", f"{file} changed") for file in files]
    here = {planned.name for planned in plan.phases}
    found += [Difference(name, "phase", "no more in the pipeline") for name in before if name not in here]
    return found + [Difference("", "profile", line) for line in _profile(plan, run, number)]


def _profile(plan: Plan, run: RunFolder, number: int) -> list[str]:
    """Return the values of the profile that are otherwise than in the one that the submission froze."""
    was = leaves(read_values(run.profile_path(number), []))
    now = leaves(yaml.load(to_yaml(plan.cluster.profile), TextLoader))
    keys = sorted(was.keys() | now.keys())
    return [f"{key} {was.get(key)!r} → {now.get(key)!r}" for key in keys if was.get(key) != now.get(key)]


def _settings(was: FrozenPhase, now: FrozenPhase) -> list[str]:
    uses = [f"uses {was.uses} → {now.uses}"] if was.uses != now.uses else []
    return uses + changed_settings(now.name, was.settings, now.settings)


def _inputs(was: FrozenPhase, now: FrozenPhase) -> list[str]:
    """Return the files and folders that are others, or have other content, or were given or left out."""
    lines = []
    for path in sorted(was.inputs.keys() | now.inputs.keys()):
        if was.inputs.get(path) != now.inputs.get(path):
            what = "left out" if path not in now.inputs else "new" if path not in was.inputs else "other content"
            lines.append(f"{path}: {what}")
    return lines


def _resources(plan: Plan, planned: PlannedPhase, was: FrozenPhase, run: RunFolder, number: int) -> list[str]:
    """Return what of sizes and of the options of sbatch is otherwise; options only where both have a script."""
    from launchers.backends.slurm_script import option_changes

    old, new = asdict(was), asdict(planned.frozen)
    keys = [*SIZES, "nodes", "ranks_per_node", "gpus_per_node"]
    script = run.script_path(number, planned.name)
    lines = []
    if plan.cluster.kind == "slurm" and script.is_file():
        keys = list(SIZES)
        lines = option_changes(script.read_text(), _script(plan, planned), but=OF_A_SUBMISSION)
    return [f"{key} {old[key] or 'none'} → {new[key] or 'none'}" for key in keys if old[key] != new[key]] + lines
