"""The code a submission runs: a copy of our packages and of the user modules its pipeline names, one for all equal.

Of each package it holds the Python files and what git tracks; where git tracks nothing of it (an installed package),
the Python files and its small data. Left out are hidden folders, virtual environments and caches, and links that lead
out of it. A copy is never more open than its source. Works from a checkout and from an installed wheel alike; git
state is recorded, not required.
"""

import importlib.util
import os
import stat
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.printing import size_text
from data_tools.mistake import Problem, UserMistake
from data_tools.own_packages import PACKAGES
from jobs.artifacts.keys import KEY_LENGTH
from jobs.artifacts.layout import code_digests_beside
from jobs.kind import user_modules
from jobs.schema.imports import closure

DATA = (".yaml", ".yml", ".json", ".jinja")  # of a package that git does not know
NOT_CODE = ("__pycache__", "node_modules", "site-packages")  # folders
MOST_BYTES = 64 << 20  # of all files of a snapshot


@dataclass
class Code:
    """What a snapshot holds: {name below it: source}, links included, and what lies there and is left out."""

    files: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def package_root(name: str) -> Path:
    """Return the folder of one of our packages."""
    spec = importlib.util.find_spec(name)
    assert spec and spec.submodule_search_locations, f"package {name} is not importable"
    return Path(list(spec.submodule_search_locations)[0])


def find_code(extra: Iterable[Path] = ()) -> Code:
    """Return the code of our packages and of users' packages (folders) and modules (files).

    Raises:
        UserMistake: a Python file that is a link out of its package, or more than MOST_BYTES.
    """
    code, problems = Code(), []
    roots = list(dict.fromkeys([*(package_root(name) for name in PACKAGES), *extra]))
    tracked = _tracked([root for root in roots if not root.is_file()])
    for root in roots:
        problems += _add(code, root, tracked.get(root, set()))
    sizes = {path: path.lstat().st_size for path in code.files.values()}
    if sum(sizes.values()) > MOST_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        problems.append(
            Problem(
                str(largest),
                f"{size_text(sizes[largest])}, the largest of {len(sizes)} files with "
                f"{size_text(sum(sizes.values()))} that each submission would copy as code; the "
                f"most is {size_text(MOST_BYTES)}: keep data out of the package (give it as an input), "
                "or out of git",
            )
        )
    if problems:
        raise UserMistake(problems)
    return code


def _add(code: Code, root: Path, tracked: set[str]) -> list[Problem]:
    """Add what belongs to the snapshot of one package or module; problems are links that Python would follow.

    Args:
        tracked: the files below it that git tracks.
    """
    if root.is_file():
        code.files[root.name] = root.resolve()
        return []
    problems = []
    for path in _walk(root):
        name = path.relative_to(root).as_posix()
        data = name in tracked if tracked else path.suffix in DATA
        data |= path.is_dir() and _stays_inside(path, root)  # a link: folders are not listed
        if path.suffix != ".py" and not data:
            if path.suffix in DATA:
                code.left_out.append(f"{root.name}/{name}")
            continue
        if path.is_symlink() and not _stays_inside(path, root):
            if path.suffix == ".py":
                problems.append(
                    Problem(
                        str(path),
                        f"is a link to {os.readlink(path)}, out of the package {root}; a "
                        "snapshot follows no links: put the file there itself",
                    )
                )
            code.left_out.append(f"{root.name}/{name}")
        elif path.is_symlink() or path.is_file():
            code.files[f"{root.name}/{name}"] = path
    return problems


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files and links below a package, but for what is no code of it (see NOT_CODE)."""
    for folder, folders, names in os.walk(root):
        linked = [name for name in folders if os.path.islink(f"{folder}/{name}")]
        folders[:] = sorted(
            name
            for name in folders
            if name not in linked
            and name not in NOT_CODE
            and not name.startswith(".")
            and not os.path.exists(f"{folder}/{name}/pyvenv.cfg")
        )
        yield from (Path(folder, name) for name in sorted([*names, *linked]))


def _stays_inside(link: Path, root: Path) -> bool:
    """Return whether a link is relative and leads to a place in its package."""
    inside = os.path.realpath(root) + os.sep
    return not os.path.isabs(os.readlink(link)) and os.path.realpath(link).startswith(inside)


def _tracked(roots: list[Path]) -> dict[Path, set[str]]:
    """Return the files below each of `roots` that git tracks, relative to it; none outside a checkout or without git.

    Git is asked once for all folders that lie beside one another, and by itself for one that may be its own checkout.
    """
    tracked: dict[Path, set[str]] = {root: set() for root in roots}
    for parent in dict.fromkeys(root.parent for root in roots):
        for name in _listed(parent, [root.name for root in roots if root.parent == parent]):
            first, _, rest = name.partition("/")
            tracked[parent / first] |= {rest} - {""}
    return {root: names or _listed(root, []) for root, names in tracked.items()}


def _listed(folder: Path, names: list[str]) -> set[str]:
    """Return the files that git tracks in a folder, or below `names` in it; none outside a checkout or without git."""
    try:
        command = ["git", "--literal-pathspecs", "-C", str(folder), "ls-files", "-z", "--", *names]
        listed = subprocess.run(command, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return set(os.fsdecode(listed.stdout).split("\0")) - {""} if listed.returncode == 0 else set()


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of where a link leads."""
    return durable.sha256_bytes(f"link {os.readlink(path)}") if path.is_symlink() else durable.sha256_file(path)


def code_digests(code: Code) -> dict[str, str]:
    """Return {file: SHA-256} of the code that a snapshot would hold now."""
    return {name: _digest(path) for name, path in code.files.items()}


def code_of(uses: str, config: Any, files: Mapping[str, Path]) -> set[str]:
    """Return those of `files` that a phase imports: its kind's, and those of tasks of the user's."""
    kind = uses if "." in uses else f"jobs.phases.{uses}"
    return closure([kind, *(module.partition(":")[0] for module in user_modules(config))], files)


def users_code_digest(module: str, code: Code, digests: Mapping[str, str]) -> str:
    """Return a digest of a user's module and of what it imports of the user's files; ours are no part of it."""
    users = {name: path for name, path in code.files.items() if name.split("/")[0] not in PACKAGES}
    imported = {name: digests[name] for name in closure([module.partition(":")[0]], users)}
    return durable.sha256_bytes(durable.canonical_json(imported))


def code_changes(sealed_code: Path, uses: str, config: Any, code: Code, digests: Mapping[str, str]) -> list[str]:
    """Return the files that a phase imports, or imported when it was sealed, and that are others now.

    `sealed_code` is the code folder of the submission that sealed it.
    """
    try:
        before = durable.read_checked(code_digests_beside(sealed_code))["files"]
    except durable.TornFile as torn:
        return [f"nobody can tell what, {torn}"]
    except (OSError, KeyError):
        return []
    changed = {name for name in before.keys() | digests.keys() if before.get(name) != digests.get(name)}
    if not changed:
        return []
    then = {name: path for name in before if (path := sealed_code / name).is_file()}
    return sorted(changed & (code_of(uses, config, code.files) | code_of(uses, config, then)))


def take_snapshot(folder: Path, shared: Path, extra: Iterable[Path] = ()) -> None:
    """Have `folder` lead to a copy of the code, with its digests (code.json beside it) and the git commit, if any.

    The copy lies in the folder `shared` under a digest of names, bytes and modes: submissions of one code share it.
    """
    code = find_code(extra)
    place = shared / _name(code.files)
    there = {path.relative_to(place).as_posix(): path for path in _walk(place)}  # another module in it shadows, perhaps
    if there.keys() != code.files.keys() or _name({name: place / name for name in code.files}) != place.name:
        place = _copied(code, shared)
    folder.symlink_to(os.path.relpath(place, folder.parent))
    digests = {name: _digest(folder / name) for name in code.files}
    durable.write_checked(
        code_digests_beside(folder), {"git": git_state(), "files": digests, "left_out": sorted(code.left_out)}
    )


def _copied(code: Code, shared: Path) -> Path:
    """Copy code into a folder of its own below `shared`, and return it: under its digest where that name is free."""
    shared.mkdir(parents=True, exist_ok=True)
    unique = shared / f"copy.{uuid.uuid4().hex[:8]}"
    for name, path in code.files.items():
        target = unique / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(path, target)
    place = shared / _name({name: unique / name for name in code.files})
    if place.exists():  # and is not what its name says: somebody edited it, for jobs of before
        return unique
    return unique.rename(place)


def _name(files: Mapping[str, Path]) -> str:
    """Return the name of a copy of these files; "" where one is missing."""
    try:
        told = {name: [_digest(path), stat.S_IMODE(path.lstat().st_mode)] for name, path in files.items()}
    except FileNotFoundError:
        return ""
    return durable.sha256_bytes(durable.canonical_json(told))[:KEY_LENGTH]


def _copy(source: Path, target: Path) -> None:
    """Copy one file, or link, with its mode; at no moment is the copy more open than the source."""
    if source.is_symlink():
        os.symlink(os.readlink(source), target)
        return
    with open(source, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o777
        copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode & 0o700 | 0o200)
        with open(copy, "wb") as out:
            out.write(file.read())
            os.fchmod(out.fileno(), mode)


def git_state() -> dict[str, str] | None:
    """Return the commit and whether the checkout was changed; None outside a checkout or without git."""
    root = package_root("jobs").parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return {"commit": commit.stdout.strip(), "dirty": "yes" if dirty.stdout.strip() else "no"}
