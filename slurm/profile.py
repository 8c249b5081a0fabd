"""The cluster profile: what an admin writes once, so that no pipeline names a partition, an account or a module.

A profile is a YAML file of the dataclasses below (`profiles/example.yaml` is the one to copy). A pipeline asks for a
role and perhaps some numbers (`Request`); `resolve` fills in the rest (`Resources`), `check` says what the cluster
would refuse. Times are Slurm's: "30" (minutes), "1:30:00", "2-00:00:00".

The dataclasses are OmegaConf structured configs too, but files are read by `load`: OmegaConf's reader takes the time
1:30:00 for the number 5400 and stops at the first error. yaml is imported where it is used: `afterok --help` must not
pay for it.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from data_tools.mistake import Problem, UserMistake, nearest
from slurm.client import Slurm
from slurm.printed import format_minutes, parse_minutes

STANDARD_ROLES = ("cpu", "train", "generate", "eval")
KINDS = ("slurm", "local")
BUILT_IN = Path(__file__).parent / "profiles"
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
REFERENCES = ("file", "cmd", "env")  # where env.secrets may point
_NOTHING = ("", "null", "~")  # YAML's ways to write no value
DEFAULT_MINUTES = 24 * 60  # a role's time where neither the admin nor the partition sets a limit


@dataclass
class Meta:
    """Who to ask. `name` is the file's name where it is not given."""

    name: str = ""
    contact: str = ""
    description: str = ""


@dataclass
class Partition:
    """What a Slurm partition allows a job (None: not known, not checked) and what every job in it must say."""

    max_time: str | None = None
    max_nodes: int | None = None
    cpus: int | None = None  # of a node
    mem_gib: int | None = None  # of a node
    gpus_per_node: int | None = None
    gpu: str | None = None  # type: a100, h100, h200, b200; with it `plan` knows memory and speed
    gpu_mem_gib: int | None = None  # of one GPU; None: that of the type
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    # whether a stopped or preempted job may run again under its id; None: asked of Slurm
    requeue: bool | None = None
    extra_sbatch: dict[str, str] = field(default_factory=dict)


@dataclass
class Role:
    """What a phase of this kind gets where its pipeline does not say."""

    partition: str | None = None  # None: the only partition, or none at all on a local profile
    time: str | None = None  # None: the partition's max_time
    nodes: int = 1
    gpus_per_node: int = 0
    gpu: str | None = None  # type and memory of one GPU; None: the partition's
    gpu_mem_gib: int | None = None
    cpus_per_task: int = 1
    mem_gib: int | None = None  # a node; None: the cluster's default
    ranks_per_node: int | None = None  # None: one a GPU, else one


@dataclass
class Env:
    """What a job's environment is made of, in this order: `forward`, `set`, `modules`, `setup`, our own, `secrets`.

    Each sees what those before it made, and may change it. `modules` are loaded with `module load`, one after the other;
    a batch shell that has no `module` gets it from where Environment Modules and Lmod are installed (launchers/
    shell_lines.py), and one that is not loaded ends the job. `setup` are lines of one shell script, run under bash's
    default options, so without -e, -u and pipefail: a command of theirs that fails is told in the job's log and does
    not end it, `exit` does. Our own are PYTHONPATH, PYTHONSAFEPATH, PYTHONUNBUFFERED, MASTER_ADDR and MASTER_PORT.
    Local processes get `set` and `secrets`.

    `secrets` maps a variable to where its value lies: "file:~/.wandb_key" and "cmd:pass show hf" are read by the worker
    on its node (jobs/secrets.py) and are written nowhere. "env:NAME" means NAME of the submitter's environment, which
    `forward` must list too. It is no secret: Slurm writes the environment that sbatch sends into the controller's
    StateSaveLocation, the node's spool, and slurmdbd where it has AccountingStoreFlags=job_env (seen with 22.05).
    """

    python: str | None = None  # interpreter of the jobs; None: the one that submits
    setup: list[str] = field(default_factory=list)  # shell lines
    modules: list[str] = field(default_factory=list)
    set: dict[str, str] = field(default_factory=dict)
    forward: list[str] = field(default_factory=list)  # names of variables taken from the submitter
    secrets: dict[str, str] = field(default_factory=dict)  # variable -> file:PATH, cmd:COMMAND or env:NAME


@dataclass
class Network:
    port_range: list[int] = field(default_factory=lambda: [20000, 29999])  # first and last port for MASTER_PORT


@dataclass
class Srun:
    mpi: str | None = None
    extra: list[str] = field(default_factory=list)


@dataclass
class Profile:
    kind: str = "slurm"  # or "local": processes of this machine
    meta: Meta = field(default_factory=Meta)
    partitions: dict[str, Partition] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    env: Env = field(default_factory=Env)
    network: Network = field(default_factory=Network)
    srun: Srun = field(default_factory=Srun)
    max_array_size: int | None = None  # None: no limit known
    max_submit_jobs: int | None = None  # of one user at a time, array elements counted; None: asked of sacctmgr
    signal_lead_s: int = 90  # seconds before the time limit at which a job is asked to stop: one checkpoint must fit


@dataclass
class Request:
    """What a phase asks for; None takes the role's value."""

    role: str
    nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gib: int | None = None
    time: str | None = None
    ranks_per_node: int | None = None
    partition: str | None = None


@dataclass(frozen=True)
class Resources:
    """What one array element gets. None means that the option is not given to sbatch."""

    role: str
    partition: str | None
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    gpu: str | None
    gpu_mem_gib: int | None
    cpus_per_task: int
    mem_gib: int | None
    time_minutes: int | None
    account: str | None
    qos: str | None
    constraint: str | None
    extra_sbatch: dict[str, str]


# -- finding and reading ----------------------------------------------------------------------------------------------


def search_folders() -> list[Path]:
    """Where a profile's name is looked up, first match wins: the user's, the site's, ours."""
    return [*site_folders(), BUILT_IN]


def site_folders() -> list[Path]:
    """The folders of profiles that users and admins wrote."""
    named = os.environ.get("AFTEROK_PROFILES", "")
    folders = [Path(folder).expanduser() for folder in named.split(os.pathsep) if folder]
    return [*folders, Path("~/.config/afterok/profiles").expanduser(), Path("/etc/afterok/profiles.d")]


def find_for_cluster(cluster_name: str) -> Path | None:
    """Return the profile that a user or admin named like a cluster, in whatever case: Slurm tells its name in small
    letters. Ours are not taken: a cluster called "example" has not chosen our example.

    Raises:
        UserMistake: one folder has the name in several spellings, none of them Slurm's.
    """
    for folder in site_folders():
        files = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
        alike = [file for file in files if file.is_file() and file.stem.casefold() == cluster_name.casefold()]
        exact = [file for file in alike if file.stem == cluster_name]
        if len(alike) > 1 and not exact:
            raise UserMistake(
                f"{' and '.join(map(str, alike))} are both named like the cluster {cluster_name}; "
                f"keep one of them, or call it {cluster_name}.yaml"
            )
        if alike:
            return (exact or alike)[0]
    return None


def find(name_or_path: str) -> Path | None:
    """The file of a profile, or None: a path as it is, a name as NAME.yaml in the search folders."""
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path if path.is_file() else None
    files = (folder / f"{name_or_path}.yaml" for folder in search_folders())
    return next((file for file in files if file.is_file()), None)


def names() -> list[str]:
    """The profiles that `load` knows by name."""
    return sorted({file.stem for folder in search_folders() if folder.is_dir() for file in folder.glob("*.yaml")})


def load(name_or_path: str) -> Profile:
    """Read and check a profile. Raises UserMistake with every problem of the file at once."""
    path = find(name_or_path)
    if path is None:
        hint = nearest(name_or_path, names())
        folders = ", ".join(map(str, search_folders()))
        raise UserMistake(f"no cluster profile {name_or_path!r}{hint}; profiles are files NAME.yaml in {folders}")
    problems: list[Problem] = []
    values = _read_yaml(path, problems)
    profile = _typed(Profile, values, str(path), "", problems)
    if not problems:
        profile.meta.name = profile.meta.name or path.stem
        problems = _meaning(profile, str(path))
    if problems:
        raise UserMistake(problems)
    return profile


def from_live(slurm: Slurm) -> Profile:
    """A profile of the cluster's own partitions, where the admin wrote none: every role on the default partition."""
    rows = [row for row in slurm.partitions() if row.state == "up"]
    if not rows:
        raise UserMistake("the cluster has no partition that is up and open to you (`sinfo` shows them)")
    configuration_limit = slurm.max_array_size()
    profile = Profile(meta=Meta(name="live", description="made from the cluster's own partitions"))
    for row in rows:
        profile.partitions[row.name] = Partition(
            max_time=None if row.max_time_minutes is None else format_minutes(row.max_time_minutes),
            max_nodes=min(row.nodes, row.max_nodes or row.nodes),
            cpus=row.cpus_per_node,
            mem_gib=row.mem_mib_per_node // 1024,
            gpus_per_node=row.gpus_per_node,
        )
    chosen = next((row for row in rows if row.default), rows[0])
    time = format_minutes(min(chosen.max_time_minutes or DEFAULT_MINUTES, DEFAULT_MINUTES))
    for role in STANDARD_ROLES:
        gpus = 0 if role == "cpu" else chosen.gpus_per_node
        cpus = max(chosen.cpus_per_node // gpus, 1) if gpus else 1
        profile.roles[role] = Role(partition=chosen.name, time=time, gpus_per_node=gpus, cpus_per_task=cpus)
    profile.max_array_size = configuration_limit
    return profile


# -- asking -----------------------------------------------------------------------------------------------------------


def resolve(profile: Profile, request: Request) -> Resources:
    """Everything an array element gets. Raises UserMistake for an unknown role or partition or an unreadable time."""
    problems = _naming(profile, request, "resources")
    if problems:
        raise UserMistake(problems)
    role = profile.roles[request.role]
    name = _partition_name(profile, request)
    partition = profile.partitions[name] if name else Partition()
    gpus = _first(request.gpus_per_node, role.gpus_per_node)
    time = _first(request.time, role.time, partition.max_time)
    # A role's ranks belong to its GPUs: asking for other GPUs without saying ranks means one a GPU again.
    role_ranks = role.ranks_per_node if request.gpus_per_node in (None, role.gpus_per_node) else None
    return Resources(
        role=request.role,
        partition=name,
        nodes=_first(request.nodes, role.nodes),
        ranks_per_node=_first(request.ranks_per_node, role_ranks, gpus if gpus > 0 else 1),
        gpus_per_node=gpus,
        gpu=_first(role.gpu, partition.gpu),
        gpu_mem_gib=_first(role.gpu_mem_gib, partition.gpu_mem_gib),
        cpus_per_task=_first(request.cpus_per_task, role.cpus_per_task),
        mem_gib=_first(request.mem_gib, role.mem_gib),
        time_minutes=None if time is None else parse_minutes(time),
        account=partition.account,
        qos=partition.qos,
        constraint=partition.constraint,
        extra_sbatch=dict(partition.extra_sbatch),
    )


def check(profile: Profile, request: Request, where: str) -> list[Problem]:
    """What the cluster would refuse or never start, each with the numbers and the nearest legal value, and the last
    with whom to ask about the limits.

    `where` is the place of the request's resources, such as "tiny.yaml: sft.resources". An array's size is not checked:
    elements beyond max_array_size share tasks.
    """
    problems = _naming(profile, request, where) or _limits(profile, request, where)
    if problems:
        last = problems[-1]
        problems[-1] = dataclasses.replace(last, message=last.message + contact_note(profile))
    return problems


def contact_note(profile: Profile) -> str:
    """Return what follows a refusal: whom to ask about this cluster, "" where its profile names nobody."""
    contact = profile.meta.contact.strip()
    return f"; contact for profile {profile.meta.name}: {contact}" if contact else ""


def _limits(profile: Profile, request: Request, where: str) -> list[Problem]:
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
    if limit.max_time is not None and wants.time_minutes > parse_minutes(limit.max_time):
        asked = format_minutes(wants.time_minutes)
        message = f"{asked} is longer than {at} allows; ask for at most {limit.max_time}"
        problems.append(Problem(f"{where}.time", message))
    return problems


def _naming(profile: Profile, request: Request, where: str) -> list[Problem]:
    """Role, partition and time of a request: without these nothing else can be said."""
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
        problems += _time_problem(f"{where}.time", request.time)
    return problems


def _partition_name(profile: Profile, request: Request) -> str | None:
    if profile.kind == "local":
        return None  # a pipeline that names a partition still runs where there is none
    only = next(iter(profile.partitions)) if len(profile.partitions) == 1 else None
    return _first(request.partition, profile.roles[request.role].partition, only)


# -- checking a file --------------------------------------------------------------------------------------------------


def _read_yaml(path: Path, problems: list[Problem]) -> dict[str, Any]:
    """The file's mapping, every scalar still text: YAML 1.1 would read the time 1:30:00 as the number 5400."""
    import yaml

    from data_tools.base.yaml_loaders import TextLoader

    try:
        values = yaml.load(path.read_text(), TextLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problems.append(Problem(f"{path}{line}", f"not readable as YAML: {getattr(error, 'problem', None) or error}"))
        return {}
    if not isinstance(values, dict):
        problems.append(Problem(str(path), "a profile is a mapping with the keys partitions, roles, ..."))
        return {}
    return values


def _typed(schema: type, values: dict[str, Any], file: str, at: str, problems: list[Problem]) -> Any:
    """A dataclass from a mapping of text; each unknown key and each value of a wrong type becomes a problem."""
    hints = get_type_hints(schema)
    result = schema()
    for key, value in values.items():
        place = f"{file}: {at}{key}"
        if key not in hints:
            message = f"unknown key{nearest(key, list(hints))}"
            problems.append(Problem(place, message))
            continue
        hint = hints[key]
        inner = get_args(hint)[1] if get_origin(hint) is dict else None
        try:
            if dataclasses.is_dataclass(hint):
                typed = _typed(hint, _mapping(value), file, f"{at}{key}.", problems)
            elif dataclasses.is_dataclass(inner):
                typed = {}
                for name, entry in _mapping(value).items():
                    place = f"{file}: {at}{key}.{name}"
                    typed[name] = _typed(inner, _mapping(entry), file, f"{at}{key}.{name}.", problems)
            else:
                typed = _leaf(hint, value)
            setattr(result, key, typed)
        except ValueError as error:
            problems.append(Problem(place, str(error)))
    return result


def _mapping(value: Any) -> dict[str, Any]:
    if value in _NOTHING:
        return {}  # `cpu:` with nothing below takes the defaults
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a mapping of keys to values")
    return value


def _leaf(hint: Any, value: Any) -> Any:
    """Text, list or mapping as `hint` wants it; ValueError with the value where it is something else."""
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{value!r} is not a list; write [{value if isinstance(value, str) else '...'}]")
        return [_leaf(get_args(hint)[0], item) for item in value]
    if get_origin(hint) is dict:
        return {key: _leaf(get_args(hint)[1], item) for key, item in _mapping(value).items()}
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not one value")
    if type(None) in get_args(hint):
        return None if value in _NOTHING else _leaf(get_args(hint)[0], value)
    if hint is bool:
        if value not in ("true", "false"):
            raise ValueError(f"{value!r} is neither true nor false")
        return value == "true"
    if hint is int:
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"{value!r} is not an integer") from None
    return value


def _meaning(profile: Profile, file: str) -> list[Problem]:
    """What types cannot say: names that must exist, times that must be readable, limits that must allow the roles."""
    problems = []
    if profile.kind not in KINDS:
        problems.append(Problem(f"{file}: kind", f"{profile.kind!r} is neither slurm nor local"))
    if not profile.roles:
        standard = ", ".join(STANDARD_ROLES)
        problems.append(Problem(f"{file}: roles", f"no roles; pipelines ask for {standard}"))
    for name, partition in profile.partitions.items():
        problems += _time_problem(f"{file}: partitions.{name}.max_time", partition.max_time)
    for name, role in profile.roles.items():
        problems += _time_problem(f"{file}: roles.{name}.time", role.time)
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
            problems += check(profile, Request(role=name), f"{file}: roles.{name}")
    return problems


def _environment_problems(env: Env, where: str) -> list[Problem]:
    """No message shows what stands where a reference belongs: it may be the secret itself."""
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
    """What `plan` and `submit` say of the variables that leave the submitter's environment; names only."""
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
    """Variables that the profile takes from the submitter's environment and that are not there."""
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


def _time_problem(where: str, time: str | None) -> list[Problem]:
    try:
        parse_minutes(time or "0")
    except ValueError as error:
        return [Problem(where, str(error))]
    return []


def to_yaml(profile: Profile) -> str:
    """The profile as a file that `load` reads back equal; what a submission freezes."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(profile), sort_keys=False, width=120)


def _first(*values: Any) -> Any:
    """The first that is not None, else None."""
    return next((value for value in values if value is not None), None)
