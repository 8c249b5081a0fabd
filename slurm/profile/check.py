"""What is wrong with a profile, and what its cluster would refuse of a request."""

import dataclasses
from collections.abc import Mapping

from data_tools.mistake import Problem
from slurm.printed import format_minutes, parse_minutes
from slurm.profile.policy import forbidden
from slurm.profile.resolve import naming_problems, resolve, time_problems
from slurm.profile.schema import KINDS, REFERENCES, STANDARD_ROLES, VARIABLE, Env, Partition, Profile, Request


def check(profile: Profile, request: Request, where: str) -> list[Problem]:
    """Return what the cluster would refuse or never start, each problem with its numbers and the nearest legal value.

    The last one also says whom to ask about the limits.

    `where` is the place of the request's resources, such as "tiny.yaml: sft.resources". An array's size is not checked:
    elements beyond max_array_size share tasks.
    """
    problems = naming_problems(profile, request, where) or [
        *_limits(profile, request, where),
        *forbidden(profile, request, wants=resolve(profile, request), where=where),
    ]
    return _with_contact(profile, problems)


def _with_contact(profile: Profile, problems: list[Problem]) -> list[Problem]:
    """Return the problems, the last of which says whom to ask."""
    last = [dataclasses.replace(problem, message=problem.message + contact_note(profile)) for problem in problems[-1:]]
    return [*problems[:-1], *last]


def contact_note(profile: Profile) -> str:
    """Return what follows a refusal: whom to ask about this cluster, "" where its profile names nobody."""
    contact = profile.meta.contact.strip()
    return f"; contact for profile {profile.meta.name}: {contact}" if contact else ""


def _limits(profile: Profile, request: Request, where: str) -> list[Problem]:
    """Return what is too small to start, or more than the partition has."""
    problems: list[Problem] = []
    wants = resolve(profile, request)
    limit = profile.partitions[wants.partition] if wants.partition else Partition()
    at = f"partition {wants.partition}" if wants.partition else "this machine"

    def too_small(key: str, value: int | None, least: int) -> None:
        if value is not None and value < least:
            problems.append(Problem(f"{where}.{key}", f"{value} is too small; the least is {least}"))

    def above(key: str, value: int | None, most: int | None, unit: str) -> None:
        if value is not None and most is not None and value > most:
            problems.append(Problem(f"{where}.{key}", f"{value} {unit}, but {at} has {most}; ask for at most {most}"))

    too_small("nodes", wants.nodes, 1)
    too_small("gpus_per_node", wants.gpus_per_node, 0)
    too_small("cpus_per_task", wants.cpus_per_task, 1)
    too_small("ranks_per_node", wants.ranks_per_node, 1)
    too_small("mem_gib", wants.mem_gib, 1)
    too_small("time", wants.time_minutes, 1)
    above("nodes", wants.nodes, limit.max_nodes, "nodes")
    above("gpus_per_node", wants.gpus_per_node, limit.gpus_per_node, "GPUs a node")
    above("mem_gib", wants.mem_gib, limit.mem_gib, "GiB a node")
    ranks, cpus = wants.ranks_per_node, wants.cpus_per_task * wants.ranks_per_node
    if limit.cpus is not None and cpus > limit.cpus:
        most = limit.cpus // ranks
        remedy = f"at most {most} cpus_per_task" if most else f"at most {limit.cpus} ranks_per_node"
        message = f"{ranks} ranks of {wants.cpus_per_task} CPUs are {cpus} a node, but {at} has {limit.cpus}; {remedy}"
        problems.append(Problem(f"{where}.cpus_per_task", message))
    longest = None if limit.max_time is None else parse_minutes(limit.max_time)
    if longest is not None and wants.time_minutes is not None and wants.time_minutes > longest:
        asked = format_minutes(wants.time_minutes)
        message = f"{asked} is longer than {at} allows; ask for at most {limit.max_time}"
        problems.append(Problem(f"{where}.time", message))
    return problems


def meaning_problems(profile: Profile, file: str) -> list[Problem]:
    """Return what types cannot say: unknown names, unreadable times, roles beyond their partition's limits."""
    problems = []
    if profile.kind not in KINDS:
        problems.append(Problem(f"{file}: kind", f"{profile.kind!r} is neither slurm nor local"))
    if not profile.roles:
        standard = ", ".join(STANDARD_ROLES)
        problems.append(Problem(f"{file}: roles", f"no roles; pipelines ask for {standard}"))
    for name, partition in profile.partitions.items():
        problems += time_problems(f"{file}: partitions.{name}.max_time", partition.max_time)
    for name, role in profile.roles.items():
        problems += time_problems(f"{file}: roles.{name}.time", role.time)
    ports = profile.network.port_range
    if len(ports) != 2 or not 1024 <= ports[0] < ports[1] <= 65535:
        message = f"{ports} is not [first, last] with 1024 <= first < last <= 65535"
        problems.append(Problem(f"{file}: network.port_range", message))
    for key, least in (("max_array_size", 1), ("max_submit_jobs", 1), ("signal_lead_s", 1)):
        value = getattr(profile, key)
        if value is not None and value < least:
            problems.append(Problem(f"{file}: {key}", f"{value} is too small; the least is {least}"))
    problems += _environment_problems(profile.env, f"{file}: env")
    for key in ("setup", "modules"):
        if profile.kind == "local" and getattr(profile.env, key):
            message = "local processes run no shell lines; say it in env.set, or before you call afterok"
            problems.append(Problem(f"{file}: env.{key}", message))
    if not problems:  # the numbers can be compared only now
        for name in profile.roles:
            where, request = f"{file}: roles.{name}", Request(role=name)
            found = naming_problems(profile, request, where) or _limits(profile, request, where)
            problems += _with_contact(profile, found)
    return problems


def _environment_problems(env: Env, where: str) -> list[Problem]:
    """Return what is wrong with `forward` and `secrets`.

    No message shows what stands where a reference belongs: it may be the secret itself.
    """
    problems = []
    for name in env.forward:
        # The list becomes sbatch's --export, where A=value would put a value into the script, and ALL means everything.
        if not VARIABLE.fullmatch(name) or name in ("ALL", "NONE", "NIL"):
            message = "an entry is not the name of a variable; write names only, [NAME, ...]"
            problems.append(Problem(f"{where}.forward", message))
    for name, reference in env.secrets.items():
        at = f"{where}.secrets.{name}"
        kind, _, value = reference.partition(":")
        if not VARIABLE.fullmatch(name):
            problems.append(Problem(at, "not the name of a variable"))
        if kind not in REFERENCES or not value:
            message = "not a reference; write file:PATH, cmd:COMMAND or env:NAME, never the value itself"
            problems.append(Problem(at, message))
        elif kind == "file" and not value.startswith(("/", "~")):
            problems.append(Problem(at, f"{reference} is relative to nobody knows what; write file:/... or file:~/..."))
        elif kind == "env" and value not in env.forward:
            message = f"{reference} is taken from the submitter's environment; list it in env.forward to allow that"
            problems.append(Problem(at, message))
        if name in env.set:
            problems.append(Problem(at, "is in env.set too; remove it there"))
    return problems


def forwarding_notes(profile: Profile, environment: Mapping[str, str]) -> list[str]:
    """Return what `plan` and `submit` say of the variables that leave the submitter's environment; names only."""
    sent = [name for name in profile.env.forward if name in environment]
    called_secret = [name for name, reference in profile.env.secrets.items() if reference.startswith("env:")]
    notes = []
    if sent:
        notes.append(
            f"forwarded from your environment into the jobs': {', '.join(sent)} "
            f"(profile {profile.meta.name}, env.forward)"
        )
    if called_secret and profile.kind == "slurm":
        notes.append(
            f"warning: {', '.join(called_secret)} will not stay secret: Slurm writes a forwarded variable to "
            "its state directory (and to slurmdbd with job_env); name a file: or cmd: in env.secrets instead"
        )
    return notes


def forwarding_problems(profile: Profile, environment: Mapping[str, str]) -> list[Problem]:
    """Return a problem for each variable that the profile forwards and the submitter's environment has not."""
    names = {reference[4:]: name for name, reference in profile.env.secrets.items() if reference.startswith("env:")}
    return [
        Problem(
            "",
            f"{source} is not set, and profile {profile.meta.name} forwards it (env.secrets.{name}); "
            f"export {source} first",
        )
        for source, name in names.items()
        if not environment.get(source)
    ]
