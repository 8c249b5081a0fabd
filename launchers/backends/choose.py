"""Chooses the back end that a run's jobs go to, and finds the one that each of its submissions went to."""

from pathlib import Path

from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from launchers.backends.contract import Backend
from launchers.backends.local import LocalBackend
from launchers.planning.ledger import Ledger
from slurm.detect import Cluster, find_cluster
from slurm.dev.cluster import command


class OtherCluster(UserMistake):
    """The run's jobs are on a Slurm that is not the one of this machine."""


def backend_for(run: RunFolder, cluster: Cluster) -> Backend:
    """Return the back end that sends a run's jobs to `cluster`."""
    if cluster.kind == "slurm":
        from launchers.backends.slurm import SlurmBackend  # here, so that a local run does not wait for submitit

        return SlurmBackend(run, cluster)
    return LocalBackend(run)


def choices_of(run: RunFolder) -> list[str]:
    """Return the cluster choices (`auto`, `local`, a profile's name, …) of a run's submissions, the first first."""
    return list(
        dict.fromkeys(event["choice"] for event in Ledger(run.ledger).events() if event["event"] == "submission")
    )


def backend_of(run: RunFolder, choice: str) -> Backend:
    """Return the back end that the submissions with this cluster choice went to.

    Raises:
        OtherCluster: the Slurm that answers is not the one that a submission went to.
        SlurmUnavailable: it does not answer.
    """
    ledger = Ledger(run.ledger)
    event = next(event for event in ledger.events() if event["event"] == "submission" and event["choice"] == choice)
    if event["backend"] == "local":
        return LocalBackend(run)
    cluster = find_cluster(choice)
    if cluster.kind != "slurm":
        remedy = "set SLURM_CONF, or use `afterok cluster exec` for a dev cluster"
        if prefix := event.get("prefix"):
            remedy = f"put `{command(Path(prefix), 'exec')}` before the command"
        raise OtherCluster(
            f"{run.path}: submission {event['submission']} went to the Slurm cluster "
            f"{event['cluster']}, which is not configured here; {remedy}"
        )
    if other := ledger.other_cluster(choice, cluster.slurm_name):
        raise OtherCluster(other)
    return backend_for(run, cluster)


def backends_of(run: RunFolder) -> dict[str, Backend]:
    """Return {cluster choice: back end} of all submissions of a run. Raises what `backend_of` does."""
    return {choice: backend_of(run, choice) for choice in choices_of(run)}
