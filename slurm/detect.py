"""Which cluster a command means: this machine, a configured Slurm, the dev cluster or a profile's.

`auto` never falls back: a Slurm that is configured and does not answer is an error, since a training that was meant for
the cluster must not start on the login node. Installed binaries alone are no Slurm, and a dev cluster counts only
where it was asked for: inside `afterok cluster exec`, or by the name `dev`.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm import client
from slurm.client import Slurm, SlurmError, SlurmTimeout, SlurmUnavailable
from slurm.dev import cluster as devcluster
from slurm.profile import files
from slurm.profile.schema import Partition, Profile

# Where packages and site builds put it; the last two are where a configless slurmd or sackd keeps what it was sent.
CONFIGURATION_FILES = (
    Path("/etc/slurm/slurm.conf"),
    Path("/etc/slurm-llnl/slurm.conf"),
    Path("/usr/local/etc/slurm.conf"),
    Path("/usr/local/slurm/etc/slurm.conf"),
    Path("/opt/slurm/etc/slurm.conf"),
    Path("/run/slurm/conf/slurm.conf"),
    Path("/var/spool/slurmd/conf-cache/slurm.conf"),
)
LOOKUP_FAILED = "DNS SRV lookup failed"  # Slurm's words where no configuration is found anywhere, 20.02 and later
GPU_DEVICES = "nvidia[0-9]*"


class NoDevCluster(SlurmUnavailable):
    """The dev cluster is not up, and nothing will start it but its user."""


@dataclass(frozen=True)
class Cluster:
    """Where phases run. `env` is for Slurm's commands and for local processes: nothing of an outer job's SLURM_*."""

    kind: str  # "slurm" or "local"
    profile: Profile
    env: dict[str, str]
    name: str
    slurm_name: str = ""  # ClusterName, as the Slurm that answers spells it
    profile_file: str = ""  # "": made from the live cluster, for the reason that `made` tells
    made: str = ""

    @property
    def where(self) -> str:
        """One line: which cluster this is, which profile describes it, and which file that is."""
        place = f"cluster {self.slurm_name or self.name}" if self.kind == "slurm" else "this machine"
        return f"{place}: {self.made or f'profile {self.profile.meta.name} ({self.profile_file})'}"

    def as_json(self) -> dict[str, str]:
        """Return what `where` tells, by name."""
        return {
            "kind": self.kind,
            "name": self.name,
            "cluster_name": self.slurm_name,
            "profile": self.profile.meta.name,
            "profile_file": self.profile_file,
        }

    @property
    def slurm(self) -> Slurm:
        """The live cluster's commands (kind "slurm")."""
        return Slurm(self.env)


def find_cluster(choice: str = "auto") -> Cluster:
    """Return the cluster that `choice` names: auto, local, slurm, dev, or a profile's name or path.

    Raises UserMistake (SlurmUnavailable) when Slurm is meant and does not answer, or there is no such profile.
    """
    if choice == "local":
        return _local("local")
    if choice == "dev":
        return _dev(devcluster.DevCluster(devcluster.default_prefix()))
    if choice in ("auto", "slurm"):
        inside = _cluster_around(os.environ)
        if inside:
            return _dev(inside)
        if choice == "slurm" or _slurm_is_configured(os.environ):
            return _slurm(None)
        return _local("local")
    return _local(choice) if files.load(choice).kind == "local" else _slurm(choice)


def can_requeue(cluster: Cluster, partition: str | None) -> bool:
    """Return whether a job there that was stopped or preempted may run again under its id.

    The profile's word counts, and Slurm's where it has none.
    """
    said = cluster.profile.partitions.get(partition or "", Partition()).requeue
    if said is not None or partition is None:
        return said is not False
    try:
        allowed = cluster.slurm.configuration().get("JobRequeue", "1") == "1"
        return allowed and cluster.slurm.preempt_mode(partition) != "CANCEL"
    except SlurmError:  # the next question to this Slurm says what is wrong with it
        return True


def _local(name: str) -> Cluster:
    """Return the processes of this machine; a role that the built-in profile leaves open takes all its GPUs."""
    chosen = files.load(name)
    if name == "local":
        for role in chosen.roles:
            if role != "cpu":
                chosen.roles[role].gpus_per_node = _gpus_here(os.environ)
    env = {key: value for key, value in client.scrubbed_environment(os.environ).items() if not key.startswith("SLURM_")}
    return Cluster("local", chosen, env, chosen.meta.name, profile_file=str(files.find(name)))


def _slurm(name: str | None) -> Cluster:
    """Return a Slurm that answers, with the profile `name`, that named like the cluster, or one made from it."""
    env = client.scrubbed_environment(os.environ)
    slurm = Slurm(env)
    slurm.ping(client.PING_LIMIT_S)
    own = cluster_name(slurm)
    if name is not None:
        chosen = files.load(name)
        return Cluster(
            "slurm", chosen, env=env, name=chosen.meta.name, slurm_name=own, profile_file=str(files.find(name))
        )
    file = files.find_for_cluster(own)
    if file is not None:
        return Cluster("slurm", files.load(str(file)), env=env, name=own, slurm_name=own, profile_file=str(file))
    looked = ", ".join(map(str, files.site_folders()))
    made = f"no profile is named like it ({own}.yaml in {looked}); used is one made from its own partitions"
    return Cluster("slurm", files.from_live(slurm), env=env, name=own, slurm_name=own, made=made)


def cluster_name(slurm: Slurm) -> str:
    """Return ClusterName of the Slurm that answers, which spells it in small letters whatever slurm.conf has."""
    try:
        return slurm.configuration().get("ClusterName", "slurm")
    except SlurmError as error:
        raise SlurmUnavailable(f"Slurm does not tell its name: {error}; submit again once it answers") from None


def _dev(cluster: devcluster.DevCluster) -> Cluster:
    """Return the dev cluster, with its profile's limits set to the shape it was started with."""
    if not cluster.is_up():
        raise NoDevCluster(f"no dev cluster is up at {cluster.prefix}; start one with `afterok cluster up`")
    env = cluster.env()
    Slurm(env).ping(client.PING_LIMIT_S)
    chosen, shape = files.load("dev"), cluster.shape
    for partition in chosen.partitions.values():
        partition.max_nodes = shape.nodes
        partition.cpus = shape.cpus
        partition.mem_gib = shape.memory_mib // 1024
        partition.gpus_per_node = shape.gpus_per_node
    chosen.max_array_size = int(cluster.settings.get("MaxArraySize", chosen.max_array_size or 0)) or None
    for role in chosen.roles.values():  # a small cluster must still start what asks for nothing special
        if role.mem_gib is not None:
            role.mem_gib = max(min(role.mem_gib, shape.memory_mib // 1024), 1)
    return Cluster(
        "slurm", chosen, env=env, name="dev", slurm_name=cluster_name(Slurm(env)), profile_file=str(files.find("dev"))
    )


def _cluster_around(env: Mapping[str, str]) -> devcluster.DevCluster | None:
    """Return the dev cluster whose `cluster exec` this process runs in: its mark and its configuration, both."""
    mark = env.get(devcluster.MARK_VARIABLE)
    if not mark:
        return None
    cluster = devcluster.DevCluster(Path(mark))
    return cluster if env.get("SLURM_CONF") == str(cluster.conf) else None


def _slurm_is_configured(env: Mapping[str, str]) -> bool:
    """Return whether this machine belongs to a Slurm, answering or not."""
    if env.get("SLURM_CONF") or env.get("SLURM_CONF_SERVER"):
        return True
    if any(file.exists() for file in CONFIGURATION_FILES):
        return True
    if shutil.which("scontrol", path=env.get("PATH")) is None:
        return False
    # Configless: the commands ask the DNS where the controller is, and say so when it knows nothing (milliseconds).
    # Anything else, silence too, means that something is there: asking it properly decides.
    try:
        Slurm(env).run(["scontrol", "ping"], client.PING_LIMIT_S)
    except SlurmTimeout:
        return True
    except SlurmError as error:
        return LOOKUP_FAILED not in error.stderr
    return True


def _gpus_here(env: Mapping[str, str]) -> int:
    """Return the GPUs that a process of this machine would see, without asking a driver."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])
    return len(list(Path("/dev").glob(GPU_DEVICES)))
