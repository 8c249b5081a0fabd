"""What is wrong with a profile, and what its cluster would refuse of a request."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from data_tools.base.bounds import BOUNDS
from data_tools.mistake import Problem, UserMistake, nearest
from data_tools.tasks import process
from slurm.profile.environments import environment_of, environments, site_variables
from slurm.profile.images import COMMA_PARTS_MOUNTS, is_relative, split
from slurm.profile.limits import limit_problems
from slurm.profile.mail import mail_problems
from slurm.profile.places import gpus_of
from slurm.profile.policy import forbidden
from slurm.profile.resolve import choices, gres_problems, naming_problems, resolve, time_problems
from slurm.profile.schema import (
    KINDS,
    REFERENCES,
    RUNTIMES,
    STANDARD_ROLES,
    VARIABLE,
    Env,
    Hooks,
    Network,
    Partition,
    Profile,
    Request,
    Storage,
)

OURS = "AFTEROK_"  # how variables of our own begin
SITE = ("AFTEROK_SCRATCH", "AFTEROK_PROFILES")  # of them, those that a site may say in `env.set` too


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
    """Return why a request without naming problems fits nowhere: at the first place in full, of the others one word."""
    (first, wants), *others = choices(profile, request)
    problems = limit_problems(wants, first, where)
    if problems and others:
        nor = [f"{place.at.rstrip(chr(44))}: {limit_problems(got, place, where)[0].message}" for place, got in others]
        last = problems[-1]
        problems[-1] = dataclasses.replace(last, message="; nor does it fit ".join([last.message, *nor]))
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
        problems += _partition_problems(partition, f"{file}: partitions.{name}")
    for name, role in profile.roles.items():
        problems += time_problems(f"{file}: roles.{name}.time", role.time)
        problems += gres_problems(f"{file}: roles.{name}.gres", role.gres, role.gpus_per_node or None)
        if role.partition is not None and role.partitions:
            problems.append(Problem(f"{file}: roles.{name}.partitions", "partition is said too; keep one of them"))
    for kind, wishes in profile.phases.items():
        problems += time_problems(f"{file}: phases.{kind}.time", wishes.time)
        problems += gres_problems(f"{file}: phases.{kind}.gres", wishes.gres, wishes.gpus_per_node)
    problems += _network_problems(profile.network, f"{file}: network")
    problems += _least_problems(profile, file)
    for place, env in environments(profile):
        problems += _environment_problems(env, f"{file}: {place}")
        problems += _unused_on_a_local_machine(profile, env, f"{file}: {place}")
        problems += [
            Problem(f"{file}: {place}.set.{name}", f"{name} is said by network or storage too; keep one of them")
            for name in site_variables(profile)
            if name in env.set
        ]
    if profile.kind == "local" and profile.hooks != Hooks():
        problems.append(
            Problem(f"{file}: hooks", "local processes have no batch script that could run them; take it out")
        )
    problems += mail_problems(profile, file)
    problems += _folder_problems(profile.storage, f"{file}: storage")
    problems += _container_problems(profile, f"{file}: container")
    if not problems:  # the numbers can be compared only now
        for name in profile.roles:
            where, request = f"{file}: roles.{name}", Request(role=name)
            found = naming_problems(profile, request, where) or _limits(profile, request, where)
            problems += _with_contact(profile, found)
    return problems


def _network_problems(network: Network, where: str) -> list[Problem]:
    """Return what is wrong with a profile's ports and the names of its interfaces."""
    problems: list[Problem] = []
    ports = network.port_range
    if len(ports) != 2 or not 1024 <= ports[0] < ports[1] <= 65535:
        message = f"{ports} is not [first, last] with 1024 <= first < last <= 65535"
        problems.append(Problem(f"{where}.port_range", message))
    if network.interface is not None and not re.fullmatch(r"=?[\w.-]+(,[\w.-]+)*", network.interface):
        message = f"{network.interface!r} is no list of names; write ib0, or eth0,eth1 (Gloo knows no others)"
        problems.append(Problem(f"{where}.interface", message))
    return problems


def _partition_problems(partition: Partition, where: str) -> list[Problem]:
    """Return what is wrong with a partition's own values and those of its kinds of nodes."""
    problems = time_problems(f"{where}.max_time", partition.max_time)
    problems += gres_problems(f"{where}.gres", partition.gres, partition.gpus_per_node)
    for kind, nodes in partition.node_types.items():
        at = f"{where}.node_types.{kind}"
        wrong = gres_problems(f"{at}.gres", nodes.gres, nodes.gpus_per_node)
        if not wrong and nodes.constraint is None and not gpus_of(nodes.gres)[0]:
            message = "nothing tells Slurm these nodes from the others: say constraint, or gres with a type"
            wrong = [Problem(at, message)]
        problems += wrong
    return problems


def _least_problems(profile: Profile, file: str) -> list[Problem]:
    """Return the counts and times of a profile that are too small to mean anything."""
    health = profile.hooks.health
    values = {key: getattr(profile, key) for key in ("max_array_size", "max_submit_jobs", "signal_lead_s")}
    values |= {f"hooks.health.{key}": getattr(health, key) for key in ("min_clock_mhz", "limit_s")}
    return [
        Problem(f"{file}: {key}", f"{value} is too small; the least is 1")
        for key, value in values.items()
        if value is not None and value < 1
    ]


def _container_problems(profile: Profile, where: str) -> list[Problem]:
    """Return what is wrong with the containers of a profile."""
    container = profile.container
    problems: list[Problem] = []
    if container.runtime not in RUNTIMES:
        message = f"{container.runtime!r} is none of {', '.join(RUNTIMES)}"
        problems.append(Problem(f"{where}.runtime", message))
    if container.runtime != "none" and profile.kind == "local":
        problems.append(Problem(f"{where}.runtime", "local processes run in no container; take it out"))
    for role in container.images:
        if role not in profile.roles and role != "default":
            known = nearest(role, [*profile.roles, "default"])
            problems.append(Problem(f"{where}.images.{role}", f"no role {role!r}{known}"))
    for role, image in container.images.items():
        if is_relative(image):
            message = f"{image!r} is relative to nobody knows what; write /..."
            problems.append(Problem(f"{where}.images.{role}", message))
    for mount in container.mounts:
        source, target, flag = split(mount)
        if "," in mount and container.runtime in COMMA_PARTS_MOUNTS:
            message = f"{mount!r}: {container.runtime} takes what is behind a comma for another mount"
            problems.append(Problem(f"{where}.mounts", message))
        elif not source.startswith("/") or (target and not target.startswith("/")) or flag not in ("", "ro"):
            problems.append(Problem(f"{where}.mounts", f"{mount!r} is not /SRC, /SRC:/DST or /SRC:/DST:ro"))
        elif flag == "ro" and container.runtime == "charliecloud":
            message = f"{mount!r}: ch-run cannot mount read-only; leave :ro out"
            problems.append(Problem(f"{where}.mounts", message))
    return problems


def _folder_problems(storage: Storage, where: str) -> list[Problem]:
    """Return the folders of a profile that are not absolute."""
    named = [("scratch", storage.scratch), ("node_local", storage.node_local)]
    return [
        Problem(f"{where}.{key}", f"{folder!r} is relative to nobody knows what; write /...")
        for key, folder in [*named, *(("shared", folder) for folder in storage.shared)]
        if folder is not None and not folder.startswith("/")
    ]


def _unused_on_a_local_machine(profile: Profile, env: Env, where: str) -> list[Problem]:
    """Return the shell lines of a profile that has no batch script to put them into."""
    if profile.kind != "local":
        return []
    message = "local processes run no shell lines; say it in env.set, or before you call afterok"
    return [Problem(f"{where}.{key}", message) for key in ("setup", "modules", "modules_init") if getattr(env, key)]


def _why_not_ours(name: str, text: str) -> str:
    """Return what is wrong with a variable of afterok's own in `env.set`, "" if nothing is."""
    readers = {bound.variable: bound.said for bound in BOUNDS} | {process.MEMORY_VARIABLE: process.memory_gib}
    if name in (process.ENVIRONMENT_VARIABLE, *SITE):
        return ""
    if name not in readers:
        return "no phase reads a variable of this name" + nearest(name, [*readers, process.ENVIRONMENT_VARIABLE])
    try:
        readers[name](text)
    except UserMistake as mistake:
        return str(mistake)
    return ""


def _environment_problems(env: Env, where: str) -> list[Problem]:
    """Return what is wrong with `forward`, `secrets` and what `set` says to afterok itself.

    No message shows what stands where a reference belongs: it may be the secret itself.
    """
    problems = [
        Problem(f"{where}.set.{name}", message)
        for name, text in env.set.items()
        if name.startswith(OURS) and (message := _why_not_ours(name, text))
    ]
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
    """Return what `plan` and `submit` say of the variables that leave the submitter's environment, and of those that
    sbatch would obey; names only."""
    every = [env for _, env in environments(profile)]
    sent = [name for name in dict.fromkeys(name for env in every for name in env.forward) if name in environment]
    secrets = [pair for env in every for pair in env.secrets.items()]
    called_secret = list(dict.fromkeys(name for name, reference in secrets if reference.startswith("env:")))
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
    unheard = sorted(name for name in environment if name.startswith("SBATCH_"))
    if unheard and profile.kind == "slurm":
        notes.append(
            f"{', '.join(unheard)} of your environment: sbatch would obey, and does not get it; say account, partition "
            "and what else it means in the phase's resources, or in a profile of yours"
        )
    return notes


def forwarding_problems(profile: Profile, environment: Mapping[str, str]) -> list[Problem]:
    """Return a problem for each variable that the profile forwards and the submitter's environment has not."""
    places = {
        reference[4:]: f"{place}.secrets.{name}"
        for place, env in reversed(list(environments(profile)))
        for name, reference in env.secrets.items()
        if reference.startswith("env:")
    }
    return [
        Problem(
            "", f"{source} is not set, and profile {profile.meta.name} forwards it ({place}); export {source} first"
        )
        for source, place in places.items()
        if not environment.get(source)
    ]


def kept_secret(profile: Profile, names: Iterable[str], where: str) -> list[Problem]:
    """Refuse variables of a pipeline whose values the profile keeps secret: overrides are written down."""
    kept = {*profile.env.secrets, *(text[4:] for text in profile.env.secrets.values() if text.startswith("env:"))}
    message = (
        f"profile {profile.meta.name} has it in env.secrets, and overrides are written down; "
        "give the variable another name"
    )
    return [Problem(f"{where}.{name}", message) for name in names if name in kept]


def unreachable_secrets(
    profile: Profile, role: str, references: Mapping[str, str], environment: Mapping[str, str]
) -> list[str]:
    """Return what keeps a job of a role from the secrets that its phase names, {variable: reference}, besides those of
    the profile. `environment` is the submitter's."""
    env = environment_of(profile, role)
    wrong = []
    for name, reference in references.items():
        source = reference.removeprefix("env:")
        if name in env.secrets or source == reference:
            continue
        where = f"name where it lies under env.secrets of profile {profile.meta.name} ({source}: file:PATH)"
        if profile.kind == "slurm" and source not in env.forward:
            wrong.append(f"{reference} reaches no job of role {role}: {where}")
        elif not environment.get(source):
            wrong.append(f"{source} is not set; export it before you submit, or {where}")
    return wrong
