"""Which file a cluster profile is, and how it is read; and the profile made from the live cluster where there is none.

Files are not read by OmegaConf: its reader takes the time 1:30:00 for the number 5400 and stops at the first error.
yaml is imported where it is used: `afterok --help` must not pay for it.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from data_tools.mistake import Problem, UserMistake, nearest
from slurm.client import Slurm
from slurm.printed import format_minutes
from slurm.profile.check import meaning_problems
from slurm.profile.schema import STANDARD_ROLES, Meta, Partition, Profile, Role

BUILT_IN = Path(__file__).parents[1] / "profiles"
DEFAULT_MINUTES = 24 * 60  # a role's time where neither the admin nor the partition sets a limit
_NOTHING = ("", "null", "~")  # YAML's ways to write no value


def search_folders() -> list[Path]:
    """Return the folders where a profile's name is looked up, the first match wins: the user's, the site's, ours."""
    return [*site_folders(), BUILT_IN]


def site_folders() -> list[Path]:
    """Return the folders of profiles that users and admins wrote."""
    named = os.environ.get("AFTEROK_PROFILES", "")
    folders = [Path(folder).expanduser() for folder in named.split(os.pathsep) if folder]
    return [*folders, Path("~/.config/afterok/profiles").expanduser(), Path("/etc/afterok/profiles.d")]


def find_for_cluster(cluster_name: str) -> Path | None:
    """Return the profile that a user or admin named like a cluster, None where nobody did.

    Upper and lower case are alike, since Slurm tells its name in small letters. Our own profiles are not taken: a
    cluster called "example" has not chosen our example.

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
    """Return the file of a profile, None if there is none: a path as it is, a name as NAME.yaml in the folders."""
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path if path.is_file() else None
    files = (folder / f"{name_or_path}.yaml" for folder in search_folders())
    return next((file for file in files if file.is_file()), None)


def names() -> list[str]:
    """Return the names of the profiles in the search folders."""
    return sorted({file.stem for folder in search_folders() if folder.is_dir() for file in folder.glob("*.yaml")})


def load(name_or_path: str) -> Profile:
    """Read and check a profile.

    Raises:
        UserMistake: there is none of this name, or it is wrong; every problem of the file is named at once.
    """
    path = find(name_or_path)
    if path is None:
        hint = nearest(name_or_path, names())
        folders = ", ".join(map(str, search_folders()))
        raise UserMistake(f"no cluster profile {name_or_path!r}{hint}; profiles are files NAME.yaml in {folders}")
    problems: list[Problem] = []
    values = _read_yaml(path, problems)
    profile = _typed(Profile, values, file=str(path), at="", problems=problems)
    if not problems:
        profile.meta.name = profile.meta.name or path.stem
        problems = meaning_problems(profile, str(path))
    if problems:
        raise UserMistake(problems)
    return profile


def from_live(slurm: Slurm) -> Profile:
    """Make a profile from the cluster's own partitions, where the admin wrote none: all roles on the default one.

    Raises:
        UserMistake: no partition is up and open to this user.
    """
    rows = [row for row in slurm.partitions() if row.state == "up"]
    if not rows:
        raise UserMistake("the cluster has no partition that is up and open to you (`sinfo` shows them)")
    profile = Profile(
        meta=Meta(name="live", description="made from the cluster's own partitions"),
        max_array_size=slurm.max_array_size(),
    )
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
    return profile


def to_yaml(profile: Profile) -> str:
    """Return the text of a file that `load` reads back equal; a submission freezes it."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(profile), sort_keys=False, width=120)


def _read_yaml(path: Path, problems: list[Problem]) -> dict[str, Any]:
    """Return the file's mapping, every scalar still text: YAML 1.1 would read the time 1:30:00 as the number 5400."""
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
    """Make a dataclass from a mapping of text; each unknown key and each value of a wrong type becomes a problem.

    `at` is the place inside `file`, such as "partitions.gpu.".
    """
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
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                typed = _typed(hint, _mapping(value), file=file, at=f"{at}{key}.", problems=problems)
            elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
                typed = {}
                for name, entry in _mapping(value).items():
                    place = f"{file}: {at}{key}.{name}"
                    typed[name] = _typed(inner, _mapping(entry), file=file, at=f"{at}{key}.{name}.", problems=problems)
            else:
                typed = _leaf(hint, value)
            setattr(result, key, typed)
        except ValueError as error:
            problems.append(Problem(place, str(error)))
    return result


def _mapping(value: Any) -> dict[str, Any]:
    """Return a mapping as it is, and an empty one for no value.

    Raises:
        ValueError: it is something else.
    """
    if value in _NOTHING:
        return {}  # `cpu:` with nothing below takes the defaults
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a mapping of keys to values")
    return value


def _leaf(hint: Any, value: Any) -> Any:
    """Return the text, list or mapping as the type `hint` wants it.

    Raises:
        ValueError: it is something else; the message shows the value.
    """
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
