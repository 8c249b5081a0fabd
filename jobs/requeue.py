"""This process's Slurm job, run again under its id: why it must not be, and how it is, away from the node that failed."""

import os
from typing import Iterable, Mapping

from jobs import stopping
from jobs.retry import SIGTERM
from jobs.run_folder import FrozenPhase, Outcome, RunFolder
from slurm.client import REQUEUE_PATIENCE_S, Slurm, SlurmError, job_element
from slurm.profile import Partition, load


def refusal_here(slurm: Slurm, received: Iterable[int]) -> str:
    """`refusal` for the job that this process is part of."""
    try:
        return refusal(slurm.job(job_element(os.environ), REQUEUE_PATIENCE_S), received)
    except SlurmError as error:
        return str(error)


def refusal(job: Mapping[str, str], received: Iterable[int]) -> str:
    """Why a worker that stopped after the signals `received` must not requeue its own Slurm job; "" when it should.

    `job` is what `scontrol show job` says. Seen on Slurm 22.05: a requeue brings a job back that scancel had just
    ended; a preemption with GraceTime leaves the job RUNNING, and one that ends by itself meanwhile is FAILED.
    """
    if job.get("JobState") != "RUNNING":
        return "Slurm is ending the job itself"
    if job.get("BatchFlag") != "1":
        return "it is no batch job"
    if job.get("Requeue") != "1":
        return "its job may not be requeued (--no-requeue or JobRequeue=0)"
    preempted = job.get("PreemptTime", "None") not in ("None", "Unknown")
    if not preempted and SIGTERM in received:
        return "SIGTERM came from neither a preemption nor the time limit"
    return ""


def requeue(slurm: Slurm, run: RunFolder, phase: FrozenPhase, attempt: int, ends: list[Outcome]) -> None:
    """Have Slurm run this job again, not on the node that failed this element last (`ends`, oldest first).

    That one node alone, besides those that the site excludes, and only where the partition has others enough.
    """
    stopping.hold()  # a requeue begins with SIGTERM, for scontrol's own process too, and there is more to ask of Slurm
    element = job_element(os.environ)
    guilty = next((end.node for end in reversed(ends) if end.node), "")
    if not guilty:
        return slurm.requeue(element)
    partition = slurm.job(element).get("Partition", "")
    if len(slurm.usable_nodes(partition) - {guilty}) < phase.nodes:
        return slurm.requeue(element)
    profile = load(str(run.submission_folder(attempt) / "profile.yaml"))
    excluded = [profile.partitions.get(partition, Partition()).extra_sbatch.get("exclude"), guilty]
    slurm.requeue(element, exclude=",".join(filter(None, excluded)))
