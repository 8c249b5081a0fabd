"""From a plan to jobs: freeze the submission, then hand what is missing to the back end.

A submission is frozen (resolved phases, pipeline, profile, code) before its first job exists, so that what runs never
depends on what the user edits meanwhile.
"""

import contextlib
import dataclasses
from typing import Iterator, Optional

from data_tools import durable
from data_tools.mistake import UserMistake
from jobs.artifact import Owner
from jobs.kind import user_module_root
from jobs.run_folder import RunFolder
from launchers.backend import ACTIVE_STATES, Backend, JobSpec
from launchers.ledger import JobEntry, Ledger
from launchers.plan import Plan
from launchers.snapshot import take_snapshot
from slurm.detect import Cluster, find_cluster
from slurm.profile import to_yaml


def backend_for(run: RunFolder, cluster: Cluster) -> Backend:
    if cluster.kind == "slurm":
        from launchers.executor import SlurmBackend

        return SlurmBackend(run, cluster)
    from launchers.local import LocalBackend

    return LocalBackend(run, cluster)


def backends_of(run: RunFolder) -> dict[str, Backend]:
    """The back ends this run's jobs went to, by the cluster choice recorded with each submission."""
    from launchers.local import LocalBackend

    found: dict[str, Backend] = {}
    for event in Ledger(run.ledger).events():
        if event["event"] != "submission" or event["choice"] in found:
            continue
        if event["backend"] == "local":
            found[event["choice"]] = LocalBackend(run)
            continue
        cluster = find_cluster(event["choice"])
        if cluster.kind != "slurm":
            raise UserMistake(f"{run.path}: submission {event['submission']} went to the Slurm cluster {event['cluster']}, which "
                              "is not configured here; set SLURM_CONF, or use `afterok cluster exec` for a dev cluster")
        found[event["choice"]] = backend_for(run, cluster)
    return found


@contextlib.contextmanager
def submit_lock(run: RunFolder) -> Iterator[None]:
    """One submitter a run; the lock of a dead one on this host is taken over."""
    run.path.mkdir(parents=True, exist_ok=True)
    path = run.path / "submit.lock"
    me = Owner.me(0, 0)
    while not durable.create_file(path, durable.canonical_json(dataclasses.asdict(me))):
        try:
            holder = Owner(**durable.read_json(path))
        except FileNotFoundError:
            continue
        if not holder.is_dead(lambda _: False):
            raise UserMistake(f"{run.path}: process {holder.pid} on {holder.host} is submitting right now; "
                              f"wait for it, or delete {path} if it is gone")
        path.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Submitted:
    """What a submit did: its number (None when there was nothing to submit) and the jobs it made or found."""

    number: Optional[int]
    jobs: dict[str, str]  # phase -> job id, submitted now
    active: dict[str, str]  # phase -> job id, submitted before and still queued or running


def submit(plan: Plan) -> Submitted:
    """Submit every phase that is not sealed and not already under way."""
    with submit_lock(plan.run):
        return _submit(plan)


def _submit(plan: Plan) -> Submitted:
    run, ledger = plan.run, Ledger(plan.run.ledger)
    active = _active_jobs(run)
    under_way: dict[str, str] = {}
    for phase in plan.phases:
        for entry in active.get(phase.name, []):
            if entry.key != phase.frozen.key:
                raise UserMistake(f"{phase.name}: job {entry.job} is still active with other settings; "
                                  f"wait for it, or `afterok cancel {run.path} {phase.name}` first")
            under_way[phase.name] = entry.job
    todo = [phase for phase in plan.to_run if phase.name not in under_way]
    if not todo:
        return Submitted(None, {}, under_way)
    number = max(run.submissions() + [0]) + 1
    folder = run.submission_folder(number)
    while folder.exists():  # a submitter died before its plan was frozen
        number, folder = number + 1, run.submission_folder(number + 1)
    folder.mkdir(parents=True)
    roots = filter(None, (user_module_root(phase.uses) for phase in plan.pipeline.phases.values()))
    take_snapshot(folder / "code", roots)
    durable.write_json(folder / "pipeline.json", {
        "source": plan.pipeline.source, "overrides": plan.pipeline.overrides, "params": plan.pipeline.params})
    durable.write_file(folder / "pipeline.yaml", open(plan.pipeline.source, "rb").read())
    durable.write_file(folder / "profile.yaml", to_yaml(plan.cluster.profile))
    run.freeze(number, plan.pipeline.name, [phase.frozen for phase in plan.phases])
    backend = backend_for(run, plan.cluster)
    ledger.append("submission", submission=number, backend=backend.name, choice=plan.pipeline.cluster,
                  cluster=plan.cluster.name)
    names = {phase.name for phase in todo} | set(under_way)
    specs = [JobSpec(phase, phase.missing, {n: t for n, t in phase.frozen.needs.items() if n in names}) for phase in todo]
    backend.submit(number, specs, under_way)
    jobs = {entry.phase: entry.job for entry in ledger.jobs() if entry.submission == number}
    return Submitted(number, jobs, under_way)


def _active_jobs(run: RunFolder) -> dict[str, list[JobEntry]]:
    """{phase: its unsealed jobs that a back end still lists as queued or running}."""
    # A sealed phase's processes may take a moment to leave; they are nobody's concern any more.
    entries = {entry.job: entry for entry in Ledger(run.ledger).jobs() if run.seal(entry.phase, entry.key) is None}
    found: dict[str, list[JobEntry]] = {}
    if not entries:
        return found
    seen = set()
    for backend in backends_of(run).values():
        for task in backend.states(list(entries)):
            if task.state in ACTIVE_STATES and task.reason != "DependencyNeverSatisfied" and task.job not in seen:
                seen.add(task.job)
                found.setdefault(entries[task.job].phase, []).append(entries[task.job])
    return found


def cancel(run: RunFolder, phases: Optional[list[str]] = None) -> list[str]:
    """Cancel the active jobs of a run, or of some of its phases. Returns the job ids."""
    active = _active_jobs(run)
    unknown = set(phases or []) - {entry.phase for entry in Ledger(run.ledger).jobs()}
    if unknown:
        raise UserMistake(f"{run.path} never submitted a phase {sorted(unknown)[0]!r}")
    jobs = [entry.job for phase, entries in active.items() if not phases or phase in phases for entry in entries]
    if jobs:
        Ledger(run.ledger).append("cancel", jobs=jobs)
        for backend in backends_of(run).values():
            backend.cancel(jobs)
    return jobs
