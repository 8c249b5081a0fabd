"""The manifest of a published training step (checkpoint.py), read with all that can be wrong with it. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake

FORMAT = 3
ONE_PART = 2  # the format of before, in which a file has one writer, and each rank a file of random states
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


@dataclass(frozen=True, slots=True)  # each rank gets them all
class Place:
    """One part of a file of a step, and what was written there."""

    file: str
    whole: int  # bytes of the file
    start: int
    size: int
    sha256: str


def places(manifest: dict[str, Any]) -> list[Place]:
    """Return the parts of all files, each hashed by itself, of a manifest as `read` returns it."""
    found = []
    for file, entry in sorted(manifest["files"].items()):
        parts, start = [entry] if manifest["format"] == ONE_PART else entry, 0
        whole = sum(size for size, _ in parts)
        for size, sha256 in parts:
            found.append(Place(file, whole, start, size, sha256))
            start += size
    return found


def rng_of(manifest: dict[str, Any], rank: int) -> tuple[str, int, int | None]:
    """Return the file of a rank's random states, their first byte, and how many they are (None: to its end)."""
    if manifest["format"] == ONE_PART:
        return f"rng/{rank}.pt", 0, None
    file, start, size = manifest["rng"][rank]
    return file, start, size


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
    if manifest.get("format") not in (FORMAT, ONE_PART):
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
        parts = [entry] if manifest["format"] == ONE_PART else entry
        if not isinstance(parts, list) or not parts or not all(_is_part(part) for part in parts):
            return f"does not say bytes and sha256 of its file {file!r:.80}"
    if manifest["format"] == ONE_PART:
        return ""
    rng = manifest.get("rng")
    if not isinstance(rng, list) or not all(_is_rng(place, manifest["files"]) for place in rng):
        return f"has {rng!r:.40} for the places of random states"
    return ""


def _is_part(part: Any) -> bool:
    return isinstance(part, list) and [type(value) for value in part] == [int, str]


def _is_rng(place: Any, files: dict[str, Any]) -> bool:
    return isinstance(place, list) and [type(value) for value in place] == [str, int, int] and place[0] in files
