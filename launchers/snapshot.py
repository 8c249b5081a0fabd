"""The code a submission runs: a copy of our packages and of the user modules its pipeline names.

Works from a checkout and from an installed wheel alike; git state is recorded, not required.
"""

import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import Iterable, Optional

from data_tools import durable

PACKAGES = ("data_tools", "megatron_ext", "slurm", "jobs", "launchers")
SUFFIXES = (".py", ".yaml", ".json")


def package_root(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec and spec.submodule_search_locations, f"package {name} is not importable"
    return Path(list(spec.submodule_search_locations)[0])


def code_files(roots: Iterable[Path]) -> dict[str, Path]:
    """{name below the snapshot: source file} of every code file of packages (folders) and modules (files)."""
    files: dict[str, Path] = {}
    for root in roots:
        if root.is_file():
            files[root.name] = root
            continue
        for path in sorted(root.rglob("*")):
            if path.suffix in SUFFIXES and "__pycache__" not in path.parts:
                files[str(Path(root.name) / path.relative_to(root))] = path
    return files


def code_digests(extra: Iterable[Path] = ()) -> dict[str, str]:
    """{file: SHA-256} of the code that would be snapshot now."""
    roots = [package_root(name) for name in PACKAGES] + list(extra)
    return {name: durable.sha256_file(path) for name, path in code_files(roots).items()}


def take_snapshot(folder: Path, extra: Iterable[Path] = ()) -> None:
    """Copy the code into `folder` with its digests (code.json beside it) and the git commit, if there is one."""
    files = code_files([package_root(name) for name in PACKAGES] + list(extra))
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    digests = {name: durable.sha256_file(folder / name) for name in files}
    durable.write_checked(folder.with_name("code.json"), {"git": git_state(), "files": digests})


def git_state() -> Optional[dict[str, str]]:
    """Commit and whether the checkout was changed; None outside a checkout or without git."""
    root = package_root("jobs").parent
    try:
        commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True,
                                timeout=5)
        dirty = subprocess.run(["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True,
                               text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return {"commit": commit.stdout.strip(), "dirty": "yes" if dirty.stdout.strip() else "no"}
