"""This process's Slurm job, run again under its id: whether it may be, and how, away from the node that failed."""

import os
from collections.abc import Iterable, Mapping

from jobs import stopping
from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.retry import SIGTERM
from slurm.client import REQUEUE_PATIENCE_S, Slurm, SlurmError, job_element
from slurm.profile.files import load
from slurm.profile.schema import Partition


def refusal_here(slurm: Slurm, received: Iterable[int]) -> str:
    """Return `refusal` for the job that this process is part of."""
    try:
        return refusal(slurm.job(job_element(os.environ), REQUEUE_PATIENCE_S), received)
    except SlurmError as error:
        return str(error)


def refusal(job: Mapping[str, str], received: Iterable[int]) -> str:
    """Return why a worker that stopped after the signals `received` must not requeue its job; "" when it should.

    `job` is what `scontrol show job` says. Seen on Slurm 22.05: a requeue brings a job back that scancel had just
    ended; a preemption with GraceTime leaves the job RUNNING, and one that ends by itself meanwhile is FAILED.
    """
    if job.get("JobState") != "RUNNING":
        return "Slurm was ending the job, as after a cancel; submit again to go on"
    if job.get("BatchFlag") != "1":
        return "it is no batch job"
    if job.get("Requeue") != "1":
        return "its job may not be requeued (--no-requeue or JobRequeue=0)"
    preempted = job.get("PreemptTime", "None") not in ("None", "Unknown")
    if not preempted and SIGTERM in received:
        return "SIGTERM came from neither a preemption nor the time limit"
    return ""


def requeue(slurm: Slurm, run: RunFolder, phase: FrozenPhase, attempt: int, ends: list[Outcome]) -> None:
    """Have Slurm run this job again, not on the node that failed this element last (`ends`, oldest first)."""
    stopping.hold()  # a requeue begins with SIGTERM, for scontrol's own process too, and there is more to ask of Slurm
    exclude = to_exclude(slurm=slurm, run=run, phase=phase, attempt=attempt, ends=ends)
    slurm.requeue(job_element(os.environ), exclude=exclude)


def to_exclude(slurm: Slurm, run: RunFolder, phase: FrozenPhase, attempt: int, ends: list[Outcome]) -> str:
    """Return the nodes that this element must not get next, "" for none.

    They are those that the site excludes, and the one that failed last where its partition has others enough.
    """
    guilty = next((end.node for end in reversed(ends) if end.node), "")
    partition = slurm.job(job_element(os.environ)).get("Partition", "") if guilty else ""
    if not guilty or len(slurm.usable_nodes(partition) - {guilty}) < phase.nodes:
        return ""
    profile = load(str(run.profile_path(attempt)))
    site = profile.partitions.get(partition, Partition()).extra_sbatch.get("exclude")
    return ",".join(filter(None, (site, guilty)))
