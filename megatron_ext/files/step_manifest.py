"""The manifest of a published training step (checkpoint.py), read with all that can be wrong with it. No torch."""

from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake

FORMAT = 2
MANIFEST = "manifest.json"
KINDS = {
    "step": int,
    "updates": int,
    "weights_digest": str,
    "files": dict,
    "identity": dict,
    "position": dict,
    "layout": str,
}


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """Return a step's manifest and "", or {} and what is wrong with it."""
    try:
        file = inside(folder, MANIFEST, needed=False)
        if file is None:
            return {}, f"{MANIFEST} is missing"
        manifest = durable.read_checked(file)
    except UserMistake as mistake:
        return {}, str(mistake).removeprefix(f"{folder}/")
    except durable.TornFile as torn:
        return {}, str(torn).removeprefix(f"{folder}/")
    except OSError as error:
        return {}, f"{MANIFEST} is unreadable ({error.strerror})"
    problem = _malformed(manifest, folder.name)
    return ({}, f"{MANIFEST} {problem}") if problem else (manifest, "")


def read_or_refuse(folder: Path, where: str) -> dict[str, Any]:
    """Return a step's manifest. UserMistake about the setting `where` that names the folder."""
    manifest, problem = read(folder)
    if problem:
        raise UserMistake(Problem(where, f"{folder}/{problem}; name another step"))
    return manifest


def has_sum(folder: Path) -> bool:
    """Return whether a step's manifest, which can be read, has a sum over itself; those written before have none."""
    return durable.SUM in durable.read_json(folder / MANIFEST)


def _malformed(manifest: dict[str, Any], name: str) -> str:
    """Return what the manifest of the folder `name` says that none says; "" where it may be one."""
    if manifest.get("format") != FORMAT:
        return f"has format {manifest.get('format')!r:.40}, and this version reads {FORMAT}"
    for field, kind in KINDS.items():
        if not isinstance(manifest.get(field), kind):
            return f"has {manifest.get(field)!r:.40} for its {field}"
    if name != f"step_{manifest['step']}" and name.startswith("step_"):
        return f"is that of step {manifest['step']}"
    if not manifest["files"]:
        return "names no file"
    for file, entry in manifest["files"].items():
        if not durable.is_plain_path(file):
            return f"names the file {file!r:.80}, which is no place in its own folder"
        if not isinstance(entry, list) or [type(value) for value in entry] != [int, str]:
            return f"does not say bytes and sha256 of its file {file!r:.80}"
    return ""
