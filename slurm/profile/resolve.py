"""What a phase gets of a cluster: its request, with the role's values and the partition's where it says nothing."""

from typing import TypeVar

from data_tools.mistake import Problem, UserMistake, nearest
from slurm.printed import parse_minutes
from slurm.profile.schema import Partition, Profile, Request, Resources

T = TypeVar("T")


def resolve(profile: Profile, request: Request) -> Resources:
    """Return everything that one array element gets.

    Raises:
        UserMistake: an unknown role or partition, or a time that cannot be read.
    """
    problems = naming_problems(profile, request, "resources")
    if problems:
        raise UserMistake(problems)
    role = profile.roles[request.role]
    name = _partition_name(profile, request)
    partition = profile.partitions[name] if name else Partition()
    gpus = _chosen(request.gpus_per_node, role.gpus_per_node)
    time = _chosen(request.time, _chosen(role.time, partition.max_time))
    # A role's ranks belong to its GPUs: asking for other GPUs without saying ranks means one a GPU again.
    role_ranks = role.ranks_per_node if request.gpus_per_node in (None, role.gpus_per_node) else None
    return Resources(
        role=request.role,
        partition=name,
        nodes=_chosen(request.nodes, role.nodes),
        ranks_per_node=_chosen(request.ranks_per_node, _chosen(role_ranks, max(gpus, 1))),
        gpus_per_node=gpus,
        gpu=_chosen(role.gpu, partition.gpu),
        gpu_mem_gib=_chosen(role.gpu_mem_gib, partition.gpu_mem_gib),
        cpus_per_task=_chosen(request.cpus_per_task, role.cpus_per_task),
        mem_gib=_chosen(request.mem_gib, role.mem_gib),
        time_minutes=None if time is None else parse_minutes(time),
        account=partition.account,
        qos=partition.qos,
        constraint=partition.constraint,
        extra_sbatch=dict(partition.extra_sbatch),
    )


def naming_problems(profile: Profile, request: Request, where: str) -> list[Problem]:
    """Return what is wrong with a request's role, partition and time: without these nothing else can be said.

    `where` is the place of the request's resources, such as "tiny.yaml: sft.resources".
    """
    problems = []
    if request.role not in profile.roles:
        message = (
            f"profile {profile.meta.name} has no role {request.role!r}{nearest(request.role, sorted(profile.roles))}"
        )
        problems.append(Problem(f"{where}.role", message))
    elif profile.kind == "slurm":
        name = _partition_name(profile, request)
        if name not in profile.partitions:
            what = f"no partition {name!r}" if name else "no one partition to take"
            known = nearest(name or "", sorted(profile.partitions))
            problems.append(Problem(f"{where}.partition", f"profile {profile.meta.name} has {what}{known}"))
    if request.time is not None:
        problems += time_problems(f"{where}.time", request.time)
    return problems


def _partition_name(profile: Profile, request: Request) -> str | None:
    """Return the partition of a request, None on a local profile or where there are several and none is said."""
    if profile.kind == "local":
        return None  # a pipeline that names a partition still runs where there is none
    only = next(iter(profile.partitions)) if len(profile.partitions) == 1 else None
    return _chosen(request.partition, _chosen(profile.roles[request.role].partition, only))


def time_problems(where: str, time: str | None) -> list[Problem]:
    """Return the problem of a time that Slurm could not read; none where no time is set."""
    try:
        parse_minutes(time or "0")
    except ValueError as error:
        return [Problem(where, str(error))]
    return []


def _chosen(asked: T | None, default: T) -> T:
    return default if asked is None else asked
