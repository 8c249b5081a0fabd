"""Which cluster a command means: this machine, a configured Slurm, the dev cluster or a profile's.

`auto` never falls back: a Slurm that is configured and does not answer is an error, since a training that was meant for
the cluster must not start on the login node. Installed binaries alone are no Slurm, and a dev cluster counts only
where it was asked for: inside `afterok cluster exec` and its jobs, or by the name `dev`.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.mistake import UserMistake
from slurm import client
from slurm.client import Slurm, SlurmError, SlurmTimeout, SlurmUnavailable
from slurm.dev import cluster as devcluster
from slurm.profile import files
from slurm.profile.layers import COMMAND_LINE, Layer, command_line, leaves
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
    loaded: files.Loaded | None = None  # where each value of the profile is from
    unasked: str = ""  # why no Slurm was asked of anything, so that the profile alone is known; "" where one answers

    @property
    def where(self) -> str:
        """One line: which cluster this is, which profile describes it, and which files that is."""
        place = f"cluster {self.slurm_name or self.name}" if self.kind == "slurm" else "this machine"
        if self.unasked:
            place = f"{place} (not asked: {self.unasked})"
        extends = f", which extends {', '.join(self.extended)}" if self.extended else ""
        top = self.loaded.layers[-1] if self.loaded else None
        said = ", ".join(leaves(top.values)) if top and top.file == COMMAND_LINE else ""
        changed = f"; the command line sets {said}" if said else ""
        profile = self.made or f"profile {self.profile.meta.name} ({self.profile_file}{extends})"
        return f"{place}: {profile}{changed}"

    @property
    def extended(self) -> list[str]:
        """The files that the profile's own is laid upon, the lowest first."""
        return self.loaded.extended if self.loaded else []

    def as_json(self) -> dict[str, str | list[str]]:
        """Return what `where` tells, by name."""
        return {
            "kind": self.kind,
            "name": self.name,
            "cluster_name": self.slurm_name,
            "profile": self.profile.meta.name,
            "profile_file": self.profile_file,
            "profile_extends": self.extended,
        }

    @property
    def slurm(self) -> Slurm:
        """The live cluster's commands (kind "slurm")."""
        return Slurm(self.env)


def find_cluster(choice: str = "auto", overrides: Sequence[str] = (), only_plan: bool = False) -> Cluster:
    """Return the cluster that `choice` names: auto, local, slurm, dev, or a profile's name or path.

    Of a pipeline's `overrides` those that begin with "cluster." are laid upon its profile. With `only_plan` a profile
    of a cluster is enough on a machine that no Slurm is configured on, such as a laptop.

    Raises UserMistake (SlurmUnavailable) when Slurm is meant and does not answer, or there is no such profile, or it is
    of another kind than the cluster: nothing of what it says would be asked of that.
    """
    cluster = _chosen(choice, command_line(overrides), only_plan)
    if cluster.kind != cluster.profile.kind:
        who = cluster.loaded.merged.culprit("kind") if cluster.loaded else cluster.profile_file
        raise UserMistake(
            f"{who}: kind: it says {cluster.profile.kind}, and {cluster.where} is of kind {cluster.kind}; take it out, "
            f"or choose another cluster (cluster=local|slurm|PROFILE)"
        )
    return cluster


def _chosen(choice: str, on_top: Layer | None, only_plan: bool) -> Cluster:
    """Return the cluster that a choice means, with the command line's values on top of its profile."""
    if choice == "local":
        return _local("local", on_top)
    if choice == "dev":
        return _dev(devcluster.DevCluster(devcluster.default_prefix()), on_top)
    if choice in ("auto", "slurm"):
        inside = _cluster_around(os.environ)
        if inside:
            return _dev(inside, on_top)
        if choice == "slurm" or _slurm_is_configured(os.environ):
            return _slurm(None, on_top)
        return _local("local", on_top)
    loaded = files.read(choice, on_top)
    if loaded.profile.kind == "local":
        return _local(choice, on_top)
    if only_plan and not _slurm_is_configured(os.environ):
        name, why = loaded.profile.meta.name, "no Slurm is configured on this machine"
        env = client.scrubbed_environment(os.environ)
        file = str(files.find(choice))
        return Cluster("slurm", loaded.profile, env, name, profile_file=file, loaded=loaded, unasked=why)
    return _slurm(choice, on_top)


def can_requeue(cluster: Cluster, partition: str | None) -> bool:
    """Return whether a job there that was stopped or preempted may run again under its id.

    The profile's word counts, and Slurm's where it has none.
    """
    said = cluster.profile.partitions.get(partition or "", Partition()).requeue
    if said is not None or partition is None or cluster.unasked:
        return said is not False
    try:
        allowed = cluster.slurm.configuration().get("JobRequeue", "1") == "1"
        return allowed and cluster.slurm.preempt_mode(partition) != "CANCEL"
    except SlurmError:  # the next question to this Slurm says what is wrong with it
        return True


def _local(name: str, on_top: Layer | None) -> Cluster:
    """Return the processes of this machine; a role that the built-in profile leaves open takes all its GPUs."""
    loaded = files.read(name, None if name == "local" else on_top)
    if name == "local":
        for role in loaded.profile.roles:
            if role != "cpu":
                loaded.profile.roles[role].gpus_per_node = _gpus_here(os.environ)
        loaded = files.overlaid(loaded.profile, str(files.find(name)), on_top)
    scrubbed = client.scrubbed_environment(os.environ, same_place=True)
    env = {key: value for key, value in scrubbed.items() if not key.startswith("SLURM_")}
    profile = loaded.profile
    return Cluster("local", profile, env, profile.meta.name, profile_file=str(files.find(name)), loaded=loaded)


def _slurm(name: str | None, on_top: Layer | None) -> Cluster:
    """Return a Slurm that answers, with the profile `name`, that named like the cluster, or one made from it."""
    env = client.scrubbed_environment(os.environ)
    slurm = Slurm(env)
    slurm.ping(client.PING_LIMIT_S)
    own = cluster_name(slurm)
    file = files.find_for_cluster(own) if name is None else files.find(name)
    made = ""
    if file is not None or name is not None:
        loaded = files.read(name or str(file), on_top)
    else:
        looked = ", ".join(map(str, files.site_folders()))
        made = f"no profile is named like it ({own}.yaml in {looked}); used is one made from its own partitions"
        loaded = files.overlaid(files.from_live(slurm), "the cluster's own partitions", on_top)
    _refuse_without_policy(own, loaded)
    return Cluster(
        "slurm",
        loaded.profile,
        env=env,
        name=own if name is None else loaded.profile.meta.name,
        slurm_name=own,
        profile_file="" if made else str(file),
        made=made,
        loaded=loaded,
    )


def _refuse_without_policy(cluster_name: str, loaded: files.Loaded) -> None:
    """Refuse a profile that leaves out the cluster's policy by not extending the admin's file."""
    policy = files.policy_file(cluster_name)
    if policy is not None and policy.resolve() not in [Path(layer.file).resolve() for layer in loaded.layers]:
        raise UserMistake(
            f"{loaded.layers[0].file}: does not extend {policy}, which has the policy of the cluster {cluster_name}; "
            f"write `extends: [{policy.stem}]` into it"
        )


def cluster_name(slurm: Slurm) -> str:
    """Return ClusterName of the Slurm that answers, which spells it in small letters whatever slurm.conf has."""
    try:
        return slurm.configuration().get("ClusterName", "slurm")
    except SlurmError as error:
        raise SlurmUnavailable(f"Slurm does not tell its name: {error}; submit again once it answers") from None


def _dev(cluster: devcluster.DevCluster, on_top: Layer | None) -> Cluster:
    """Return the dev cluster, with its profile's limits set to the shape it was started with."""
    if not cluster.is_up():
        raise NoDevCluster(
            f"no dev cluster is up at {cluster.prefix}; start one with `{devcluster.command(cluster.prefix, 'up')}`"
        )
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
    file = str(files.find("dev"))
    loaded = files.overlaid(chosen, file, on_top)
    own = cluster_name(Slurm(env))
    return Cluster("slurm", loaded.profile, env=env, name="dev", slurm_name=own, profile_file=file, loaded=loaded)


def _cluster_around(env: Mapping[str, str]) -> devcluster.DevCluster | None:
    """Return the dev cluster whose `cluster exec` this process runs in, by its mark and its configuration, both; or one
    of whose jobs it is, whatever of the mark was exported with that: a profile is the same by every door."""
    configuration = env.get("SLURM_CONF", "")
    mark = env.get(devcluster.MARK_VARIABLE)
    if mark is None and env.get("SLURM_JOB_ID"):
        mark = str(devcluster.prefix_of(Path(configuration)) or "")
    if not mark:
        return None
    cluster = devcluster.DevCluster(Path(mark))
    return cluster if configuration == str(cluster.conf) else None


def _slurm_is_configured(env: Mapping[str, str]) -> bool:
    """Return whether this machine belongs to a Slurm, answering or not."""
    if env.get("SLURM_CONF") or env.get("SLURM_CONF_SERVER"):
        return True
    if env.get("SLURM_JOB_ID"):  # a job, whose PATH may lack Slurm's commands and whose Slurm may be configless
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
