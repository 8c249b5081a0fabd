"""Which file a cluster profile is, and how it is read; and the profile made from the live cluster where there is none.

Files are not read by OmegaConf: its reader takes the time 1:30:00 for the number 5400 and stops at the first error.
yaml is imported where it is used: `afterok --help` must not pay for it.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from data_tools.mistake import Problem, UserMistake, nearest
from slurm.client import Slurm
from slurm.printed import format_minutes
from slurm.profile.admins import why_no_admins
from slurm.profile.check import meaning_problems
from slurm.profile.layers import COMMAND_LINE, Layer, Merged, merge, read_values
from slurm.profile.policy import policy_problems
from slurm.profile.schema import STANDARD_ROLES, Meta, Partition, Policy, Profile, Role
from slurm.profile.typed import typed

ADMINS_FOLDER = Path("/etc/afterok/profiles.d")
BUILT_IN = Path(__file__).parents[1] / "profiles"
DEFAULT_MINUTES = 24 * 60  # a role's time where neither the admin nor the partition sets a limit


def search_folders() -> list[Path]:
    """Return the folders where a profile's name is looked up, the first match wins: the user's, the site's, ours."""
    return [*site_folders(), BUILT_IN]


def site_folders() -> list[Path]:
    """Return the folders of profiles that users and admins wrote."""
    named = os.environ.get("AFTEROK_PROFILES", "")
    folders = [folder for folder in named.split(os.pathsep) if folder]
    return list(dict.fromkeys([*map(expanded, [*folders, "~/.config/afterok/profiles"]), ADMINS_FOLDER]))


def expanded(path: str) -> Path:
    """Return a path with ~ and ~USER written out. Raise UserMistake where no such home is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserMistake(f"{path}: the home that it begins with is not known here; write the whole path") from None


def find_for_cluster(cluster_name: str) -> Path | None:
    """Return the profile that a user or admin named like a cluster, None where nobody did.

    Upper and lower case are alike, since Slurm tells its name in small letters. Our own profiles are not taken: a
    cluster called "example" has not chosen our example.

    Raises:
        UserMistake: one folder has the name in several spellings, none of them Slurm's.
    """
    return next((file for folder in site_folders() if (file := _alike(folder, cluster_name))), None)


def _alike(folder: Path, name: str) -> Path | None:
    """Return a folder's file of this name in any case, None where it has none. Raises what find_for_cluster does."""
    files = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
    alike = [file for file in files if file.is_file() and file.stem.casefold() == name.casefold()]
    exact = [file for file in alike if file.stem == name]
    if len(alike) > 1 and not exact:
        raise UserMistake(
            f"{' and '.join(map(str, alike))} are both named like the cluster {name}; "
            f"keep one of them, or call it {name}.yaml"
        )
    return (exact or alike)[0] if alike else None


def policy_file(cluster_name: str) -> Path | None:
    """Return the admin's file for a cluster where it has a policy, which every profile used there has to extend.

    Raises:
        UserMistake: that file is wrong, or others may write it, and its policy must not be left out for that.
    """
    file = _alike(ADMINS_FOLDER, cluster_name)
    return file if file is not None and read(str(file)).profile.policy != Policy() else None


def find(name_or_path: str) -> Path | None:
    """Return the file of a profile, None if there is none: a path as it is, a name as NAME.yaml in the folders."""
    path = expanded(name_or_path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path if path.is_file() else None
    files = (folder / f"{name_or_path}.yaml" for folder in search_folders())
    return next((file for file in files if file.is_file()), None)


def names() -> list[str]:
    """Return the names of the profiles in the search folders."""
    return sorted({file.stem for folder in search_folders() if folder.is_dir() for file in folder.glob("*.yaml")})


@dataclass(frozen=True)
class Loaded:
    """A profile as it counts, and where each of its values is from."""

    profile: Profile
    layers: list[Layer]  # of these files, the lowest first
    merged: Merged

    @property
    def extended(self) -> list[str]:
        """The files, lowest first, that the profile's own file and the command line are laid upon."""
        files = [layer.file for layer in self.layers if layer.file != COMMAND_LINE]
        return files[:-1]


def load(name_or_path: str) -> Profile:
    """Read and check a profile.

    Raises:
        UserMistake: there is none of this name, or it is wrong; every problem of its files is named at once.
    """
    return read(name_or_path).profile


def read(name_or_path: str, on_top: Layer | None = None) -> Loaded:
    """Read and check a profile with all that it extends, and `on_top` the values of the command line.

    A file in one of the site's folders extends the next of the same name: a user's that of the admin.

    Raises:
        UserMistake: there is none of this name, or it is wrong; every problem of its files is named at once.
    """
    path = _named(name_or_path)
    problems: list[Problem] = []
    layers: list[Layer] = []
    _stack(path, layers, (), problems)
    if problems:
        raise UserMistake(problems)
    return build([*layers, *([on_top] if on_top else [])], path.stem)


def overlaid(profile: Profile, file: str, on_top: Layer | None) -> Loaded:
    """Return a profile that was made or changed by us, with the command line's values on top; `file` is said of it.

    Raises:
        UserMistake: these are wrong.
    """
    import yaml

    from data_tools.base.yaml_loaders import TextLoader

    values = yaml.load(to_yaml(profile), TextLoader)
    layers = [Layer(file, values), *([on_top] if on_top else [])]
    return build(layers, profile.meta.name)


def build(layers: list[Layer], name: str) -> Loaded:
    """Make a profile of layers, the lowest first, and apply the admin's policy last.

    Raises:
        UserMistake: every problem of the layers at once.
    """
    problems: list[Problem] = []
    for layer in layers:
        typed(Profile, layer.values, file=layer.file, at="", problems=problems)
    if problems:
        raise UserMistake(problems)
    merged = merge(layers)
    merged.values.pop("extends", None)
    profile = typed(Profile, merged.values, file=layers[-1].file, at="", problems=problems)
    profile.meta.name = profile.meta.name or name
    top = f"{layers[-1].file}: "
    for problem in meaning_problems(profile, layers[-1].file):
        key = problem.where.removeprefix(top)
        problems.append(dataclasses.replace(problem, where=f"{merged.culprit(key) or layers[-1].file}: {key}"))
    problems += policy_problems(layers, merged, profile.policy)
    if problems:
        raise UserMistake(problems)
    return Loaded(profile, layers, merged)


def _named(name_or_path: str, beyond: Path | None = None) -> Path:
    """Return the file of a profile; `beyond`, the one that extends it, is not it. Raises UserMistake for none."""
    path = find(name_or_path)
    if path is not None and beyond is not None and path.resolve() == beyond.resolve():
        folders = search_folders()
        later = folders[folders.index(path.parent) + 1 :] if path.parent in folders else []
        path = next((file for folder in later if (file := _alike(folder, name_or_path))), None)
    if path is None:
        hint = nearest(name_or_path, names())
        looked = ", ".join(map(str, search_folders()))
        who = f"{beyond}: extends: " if beyond else ""
        raise UserMistake(f"{who}no cluster profile {name_or_path!r}{hint}; profiles are files NAME.yaml in {looked}")
    return path


def _stack(path: Path, layers: list[Layer], inside: tuple[Path, ...], problems: list[Problem]) -> frozenset[str]:
    """Add the layers of a file to those below it: of what it extends first, each file once, then its own.

    Returns all these files.
    """
    if path.resolve() in inside:
        circle = " extends ".join(str(file) for file in (*inside[inside.index(path.resolve()) :], path.resolve()))
        raise UserMistake(f"{circle}: a profile cannot extend itself; take one `extends` out")
    if found := next((layer for layer in layers if layer.file == str(path)), None):
        return found.below | {found.file}
    below: frozenset[str] = frozenset()
    values = read_values(path, problems)
    bases = values.get("extends")
    for base in [next_of_same_name(path), *(bases if isinstance(bases, list) else [])]:
        if isinstance(base, list | dict):
            problems.append(Problem(f"{path}: extends", f"{base!r} is neither a profile's name nor its file"))
            continue
        if base is None:
            continue
        if isinstance(base, str):  # a path is meant from the file that says it
            near = path.parent / expanded(base)
            base = near if near.is_file() and near.suffix in (".yaml", ".yml") else _named(base, beyond=path)
        below |= _stack(base, layers, (*inside, path.resolve()), problems)
    why = why_no_admins(path)
    layers.append(Layer(str(path), values, is_admins=not why, why_not=why, below=below))
    return below | {str(path)}


def next_of_same_name(path: Path) -> Path | None:
    """Return the file that one in a site's folder extends without saying so: the next of its name, None for none."""
    folders = site_folders()
    if path.parent not in folders:
        return None
    later = folders[folders.index(path.parent) + 1 :]
    alike = (_alike(folder, path.stem) for folder in later)
    return next((file for file in alike if file is not None and file.resolve() != path.resolve()), None)


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
    """Return the text of a file that `load` reads back equal, without what it extends and the policy: both are applied.

    A submission freezes it.
    """
    import yaml

    values = {key: value for key, value in dataclasses.asdict(profile).items() if key not in ("extends", "policy")}
    return yaml.safe_dump(values, sort_keys=False, width=120)
