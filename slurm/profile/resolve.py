"""What a phase gets of a cluster: its request, with the role's values and the partition's where it says nothing.

Of several partitions, and kinds of nodes in them, the first is taken that all of it fits.
"""

from dataclasses import replace
from typing import TypeVar

from data_tools.mistake import Problem, UserMistake, nearest
from slurm.printed import parse_minutes
from slurm.profile.limits import limit_problems
from slurm.profile.places import Place, gpus_of, items, partition_names, places
from slurm.profile.schema import Profile, Request, Resources, Role

T = TypeVar("T")


def resolve(profile: Profile, request: Request) -> Resources:
    """Return everything that one array element gets.

    Raises:
        UserMistake: an unknown role or partition, or a time or generic resource that cannot be read.
    """
    problems = naming_problems(profile, request, "resources")
    if problems:
        raise UserMistake(problems)
    return choices(profile, request)[0][1]


def with_defaults(profile: Profile, uses: str, request: Request) -> Request:
    """Return a request with what the profile says of phases of this kind where it says nothing itself.

    What depends on one another stays together: of a phase that says `gres` no other number of GPUs is taken.
    """
    if uses not in profile.phases:
        return request
    default, asked = vars(profile.phases[uses]), vars(request)
    gpus = ("gres", "gpus_per_node", "ranks_per_node")
    left = [key for key in default if asked[key] is None]
    if any(asked[key] is not None for key in gpus[:2]):
        left = [key for key in left if key not in gpus]
    return replace(request, **{key: default[key] for key in left})


def choices(profile: Profile, request: Request) -> list[tuple[Place, Resources]]:
    """Return each place of a request without naming problems and what it would get there; those that fit first."""
    every = [(place, _at(profile, request, place)) for place in places(profile, request)]
    return sorted(every, key=lambda choice: bool(limit_problems(choice[1], choice[0], "")))  # stable


def _at(profile: Profile, request: Request, place: Place) -> Resources:
    """Return what a request gets at a place."""
    role, limits = profile.roles[request.role], place.limits
    gres = _chosen(request.gres, role.gres)
    gpus = _chosen(_chosen(request.gpus_per_node, gpus_of(gres)[1]), role.gpus_per_node)
    time = _chosen(request.time, _chosen(role.time, limits.max_time))
    # GPUs of another name than the place's are other GPUs, of which its memory says nothing.
    other = gpus_of(gres)[0] if gpus_of(gres)[0] not in ("", limits.gpu, role.gpu, gpus_of(limits.gres)[0]) else ""
    # A role's ranks belong to its GPUs: asking for other GPUs without saying ranks means one a GPU again.
    role_ranks = role.ranks_per_node if gpus == role.gpus_per_node else None
    return Resources(
        role=request.role,
        partition=place.partition,
        nodes=_chosen(request.nodes, role.nodes),
        ranks_per_node=_chosen(request.ranks_per_node, _chosen(role_ranks, max(gpus, 1))),
        gpus_per_node=gpus,
        gpu=other or _chosen(role.gpu, limits.gpu),
        gpu_mem_gib=None if other else _chosen(role.gpu_mem_gib, limits.gpu_mem_gib),
        cpus_per_task=_chosen(request.cpus_per_task, role.cpus_per_task),
        mem_gib=_chosen(request.mem_gib, role.mem_gib),
        time_minutes=None if time is None else parse_minutes(time),
        account=_said("account", request, role, place),
        qos=_said("qos", request, role, place),
        constraint=_constraint(profile, request, place),
        extra_sbatch=dict(limits.extra_sbatch),
        reservation=_said("reservation", request, role, place),
        licenses=_said("licenses", request, role, place),
        gres=_gres(gres, limits.gres, gpus),
        node_type=place.node_type,
    )


def least_minutes(wants: Resources) -> int | None:
    """Return the shortest time limit in minutes that a job may get: sbatch's --time-min, else its time limit."""
    least = next((wants.extra_sbatch[key] for key in ("time-min", "time_min") if key in wants.extra_sbatch), None)
    return (
        wants.time_minutes if least is None else min(parse_minutes(least), wants.time_minutes or parse_minutes(least))
    )


def _said(key: str, request: Request, role: Role, place: Place) -> str | None:
    """Return what the phase says of a key, else the role, else the partition."""
    return _chosen(getattr(request, key), _chosen(getattr(role, key), getattr(place.limits, key)))


def _constraint(profile: Profile, request: Request, place: Place) -> str | None:
    """Return the constraint of a request and that of the kind of nodes it gets, both where both are said."""
    said = _said("constraint", request, profile.roles[request.role], place)
    if place.partition is None or place.node_type is None:
        return said
    of_nodes = profile.partitions[place.partition].node_types[place.node_type].constraint
    if said is None or of_nodes is None or said == of_nodes:
        return _chosen(said, of_nodes)
    return "&".join(f"({one})" if "|" in one else one for one in (said, of_nodes))


def _gres(asked: str | None, named: str | None, gpus: int) -> str | None:
    """Return the generic resources to ask for: GPUs by the name the site or the phase gives them, and all others.

    GPUs without a name are no part of it: they are asked for as GPUs a node.
    """
    wanted = [item for item in (items(asked) if asked else []) if item[0] != "gpu"]
    others = [f"{name}:{kind}:{count}" if kind else f"{name}:{count}" for name, kind, count in wanted]
    kind = gpus_of(asked)[0] or gpus_of(named)[0]
    named_gpus = [f"gpu:{kind}:{gpus}"] if gpus and kind else []
    return ",".join([*named_gpus, *others]) or None


def naming_problems(profile: Profile, request: Request, where: str) -> list[Problem]:
    """Return what is wrong with a request's role, partition, time and gres: without these nothing else can be said.

    `where` is the place of the request's resources, such as "tiny.yaml: sft.resources".
    """
    problems = []
    if request.role not in profile.roles:
        message = (
            f"profile {profile.meta.name} has no role {request.role!r}{nearest(request.role, sorted(profile.roles))}"
        )
        problems.append(Problem(f"{where}.role", message, "S001"))
    elif profile.kind == "slurm":
        names = partition_names(profile, request)
        for name in names or [""]:
            if name not in profile.partitions:
                what = f"no partition {name!r}" if name else "no one partition to take"
                known = nearest(name, sorted(profile.partitions))
                message = f"profile {profile.meta.name} has {what}{known}"
                problems.append(Problem(f"{where}.partition", message, "P001"))
    if request.time is not None:
        problems += time_problems(f"{where}.time", request.time)
    if request.gres is not None:
        problems += gres_problems(f"{where}.gres", request.gres, request.gpus_per_node)
    return problems


def time_problems(where: str, time: str | None) -> list[Problem]:
    """Return the problem of a time that Slurm could not read; none where no time is set."""
    try:
        parse_minutes(time or "0")
    except ValueError as error:
        return [Problem(where, str(error), "S001")]
    return []


def gres_problems(where: str, gres: str | None, gpus: int | None) -> list[Problem]:
    """Return what is wrong with generic resources that stand beside `gpus` GPUs a node; none where none are set."""
    if gres is None:
        return []
    try:
        found = items(gres)
    except ValueError as error:
        return [Problem(where, str(error), "S001")]
    counted = gpus_of(gres)[1]
    if sum(name == "gpu" for name, _, _ in found) > 1:
        return [Problem(where, f"{gres!r} names GPUs twice; a phase's nodes are of one kind", "S001")]
    if counted is not None and gpus is not None and counted != gpus:
        message = f"{gres!r} has {counted} GPUs, and gpus_per_node is {gpus}; say one of them"
        return [Problem(where, message, "S001")]
    return []


def _chosen(asked: T | None, default: T) -> T:
    return default if asked is None else asked
