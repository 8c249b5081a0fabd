"""What would go wrong with jobs once they are sent, asked of the live cluster, the disk and the hub's cache.

The checks are those of slurm/checks.py. What cannot be asked is said, and refuses nothing.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from data_tools.base.printing import size_text
from data_tools.mistake import Problem
from data_tools.records import hub
from jobs.artifacts.layout import checkpoints_of
from jobs.artifacts.run_folder import RunFolder
from jobs.schema.pipeline import Phase
from launchers.planning.plan import RUNS, PlannedPhase
from slurm.client import SlurmError
from slurm.detect import Cluster
from slurm.profile.environments import hub_cache, why_not_shared
from slurm.profile.images import unseen
from slurm.verify.asked import findings
from slurm.verify.checks import preemption
from slurm.verify.live import Live, ask

NOT_ASKED = (
    "partitions and nodes", "accounts and QOS", "reservations and maintenance", "your jobs in the queue",
    "whether stopped jobs may be requeued", "free space", "folders of logs", "the hub's cache",
)  # fmt: skip


@dataclass
class Job:
    """One phase that is to run, as preflight sees it."""

    phase: Phase
    planned: PlannedPhase
    where: str  # the place of its resources, such as "tiny.yaml: phases.sft.resources"
    fits: bool  # whether its profile has these resources; what the cluster says of others means nothing
    datasets: list[str] = field(default_factory=list)  # of the hub, that it reads from the cache


@dataclass
class Report:
    """What was found, and what could not be asked."""

    problems: list[Problem] = field(default_factory=list)
    not_asked: list[str] = field(default_factory=list)


def preflight(cluster: Cluster, run: RunFolder, jobs: Sequence[Job], costs: dict[str, dict[str, float]]) -> Report:
    """Return what would go wrong with the jobs of a plan; `costs` are those of each phase (jobs/kind.py)."""
    jobs = [job for job in jobs if job.planned.action in RUNS]
    report = Report()
    if cluster.unasked:
        report.not_asked = [f"{', '.join(NOT_ASKED)}: {cluster.unasked}"]
        return report
    if cluster.kind == "slurm" and jobs:
        _ask_cluster(cluster, jobs, report)
    report.problems += _logs(run, jobs) + _space(run, jobs, costs)
    for job in jobs:
        report.problems += _hub(cluster, job)
    report.problems = list(dict.fromkeys(report.problems))
    return report


def _ask_cluster(cluster: Cluster, jobs: Sequence[Job], report: Report) -> None:
    """Add what the live cluster has against the jobs."""
    try:
        live = ask(cluster.slurm)
    except SlurmError as error:
        report.not_asked.append(f"partitions, nodes, accounts and reservations: {error}")
        return
    if live.accounts is None and "slurmdbd" in live.configuration.get("AccountingStorageType", ""):
        report.not_asked.append("accounts and QOS: Slurm's accounting does not answer")
    now, running = datetime.now(), {job.phase.name for job in jobs}
    for job in jobs:
        if job.fits:
            first = not any(need in running for need in job.planned.frozen.needs)
            report.problems += _against(cluster, job, live, now if first else None)


def _against(cluster: Cluster, job: Job, live: Live, now: datetime | None) -> list[Problem]:
    """Return what the cluster has against one job; what it did not say itself is said to be the profile's."""
    profile, wants = cluster.profile, job.planned.resources
    found = []
    for problem in findings(wants, live, job.where, now):
        key = problem.where.rpartition(".")[2]
        if getattr(job.phase.resources, key, None) is None:
            said = f" (of profile {profile.meta.name}, role {wants.role})"
            problem = dataclasses.replace(problem, message=problem.message + said)
        found.append(problem)
    if job.phase.kind.can_stop:
        file = cluster.profile_file or profile.meta.name
        for problem in preemption(profile, live, partition=wants.partition or "", qos=wants.qos or ""):
            found.append(dataclasses.replace(problem, where=f"{file}: {problem.where}"))
    return found


def _standing(path: Path) -> Path:
    """Return the path, or the nearest above it that exists."""
    return next(folder for folder in (path, *path.parents) if os.path.lexists(folder))


def _logs(run: RunFolder, jobs: Sequence[Job]) -> list[Problem]:
    """Return the folders of logs that cannot be made or written; Slurm itself fails such jobs without a word."""
    if run.path.exists() and not os.access(run.path, os.W_OK | os.X_OK):
        return []  # plan may look at such a run, and submit says so itself
    wrong: dict[Path, str] = {}
    for job in jobs:
        place = _standing(run.logs_folder(job.phase.name))
        if not place.is_dir():
            wrong[place] = f"{place} is no folder, and the logs of {job.phase.name} belong below it; move it away"
        elif not os.access(place, os.W_OK | os.X_OK):
            wrong[place] = (
                f"{place} may not be written, and the logs of {job.phase.name} belong below it; choose --run DIR"
            )
    return [Problem("", message, "F005") for message in wrong.values()]


def _space(run: RunFolder, jobs: Sequence[Job], costs: dict[str, dict[str, float]]) -> list[Problem]:
    """Return that the disk has no room for what all phases leave; checkpoints that lie there already are counted."""
    jobs = [job for job in jobs if not job.planned.frozen.rehearsal]  # which leaves nothing
    wanted = {job.phase.name: costs[job.phase.name].get("bytes", 0.0) * len(job.planned.missing) for job in jobs}
    for job in jobs:
        if wanted[job.phase.name]:
            left = wanted[job.phase.name] - _held(run.artifact(job.planned.frozen).folder)
            wanted[job.phase.name] = max(left, 0.0)
    place = _standing(run.path)
    disk = os.statvfs(place)
    free, needed = disk.f_bavail * disk.f_frsize, sum(wanted.values())
    if needed <= free:
        return []
    each = ", ".join(f"{name} {size_text(size)}" for name, size in wanted.items() if size)
    message = (
        f"{size_text(needed)} of checkpoints and weights at the least ({each}), and {size_text(free)} are free "
        f"where {run.path} lies; free some, keep fewer (keep_checkpoints), or choose another folder with --run DIR"
    )
    return [Problem("", message, "D001")]


def _held(folder: Path) -> int:
    """Return the bytes of the checkpoints of a phase's folder."""
    held = 0
    try:
        for step in checkpoints_of(folder):
            held += sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    except FileNotFoundError:  # a job of the phase is at work there
        pass
    return held


def _hub(cluster: Cluster, job: Job) -> list[Problem]:
    """Return which datasets of the hub are nowhere here, and where a job will not look for them."""
    if not job.datasets:
        return []
    name, profile = job.phase.name, cluster.profile
    role = job.planned.resources.role
    absent = [Problem("", why, "H001") for why in hub.missing(job.datasets)]
    ours, theirs = hub.cache(), hub_cache(profile, role, os.environ)
    if theirs is None or len(absent) == len(job.datasets) or cluster.kind == "local":
        return absent
    why = ""
    if theirs != ours:
        lost = hub.missing(job.datasets, theirs)
        why = f"the job will look for them in {theirs}" if len(lost) > len(absent) else ""
    elif unseen(profile, role, run=Path("/nowhere"), paths=[str(theirs)]):
        why = f"the container of role {role} does not see {theirs}"
    elif profile.storage.node_local and theirs.is_relative_to(profile.storage.node_local):
        why = f"{theirs} is a folder of each node's own"
    elif why_not_shared(profile, theirs):
        why = f"{theirs} is in none of the folders that profile {profile.meta.name} says all nodes share"
    if not why:
        return absent
    sets = ", ".join(dict.fromkeys(job.datasets))
    message = f"{name} reads {sets} of the hub, which {ours} has, and {why}; set HF_HOME in the profile's env.set"
    return [*absent, Problem("", message, "H002")]
