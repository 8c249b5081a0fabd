"""The files of a folder that somebody else may have made: models, adapters, tokenizers, checkpoints.

A name in an index, or a link, could lead anywhere: to a private file of the user, which would be copied into the run,
or to one that is in no key. `inside` answers for all of them. Links of the hub's cache are as they should be: there a
snapshot's files are links to the blobs of its repository.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import overload

from data_tools.mistake import Problem, UserMistake

_REMEDY = "remove the link, or put the file itself there"
SNAPSHOTS, BLOBS = "snapshots", "blobs"  # of a repository in the hub's cache


@overload
def inside(folder: Path, name: str) -> Path: ...


@overload
def inside(folder: Path, name: str, needed: bool) -> Path | None: ...


def inside(folder: Path, name: str, needed: bool = True) -> Path | None:
    """Return the file `name` of `folder`, every link followed; None where there is none and it is not `needed`.

    Raise UserMistake where the name or a link leads out of the folder, where it is no regular file, or where it is
    missing.
    """
    path = Path(folder) / name
    parts = Path(name).parts
    if not parts or os.path.isabs(name) or ".." in parts or "\0" in name:
        raise UserMistake(Problem(str(folder), f"the name {name!r} leads out of the folder: give files that are in it"))
    try:
        found = Path(os.path.realpath(path, strict=True))
        mode = found.stat().st_mode
    except FileNotFoundError:
        if not needed and not path.is_symlink():
            return None
        gone = "is a link to a file that is not there" if path.is_symlink() else "is missing"
        raise UserMistake(Problem(str(path), f"{gone}; copy or download it again")) from None
    except (OSError, ValueError) as error:  # a circle of links, a name that is too long, a folder that is closed
        raise UserMistake(Problem(str(path), f"cannot be read ({error})")) from None
    home = Path(os.path.realpath(folder))
    if not Path(os.path.realpath(path.parent)).is_relative_to(home):  # whose files are in no digest of the folder
        raise UserMistake(Problem(str(path), f"lies in a link to another folder: {_REMEDY}"))
    if not any(found.is_relative_to(place) for place in _places(home)):
        raise UserMistake(Problem(str(path), f"is a link to {found}, outside of the folder: {_REMEDY}"))
    if not stat.S_ISREG(mode):
        raise UserMistake(Problem(str(path), "is no regular file"))
    return found


def _places(folder: Path) -> Iterator[Path]:
    """Yield the folder, and where else the hub's client keeps the files of such a folder."""
    yield folder
    for cache in (folder, *folder.parents):
        if cache.parent.name == SNAPSHOTS:
            yield from _real(cache.parent.parent / BLOBS)
    hub = _hub_cache()
    if hub.is_dir():
        for blobs in hub.glob(f"*--*/{BLOBS}"):
            yield from _real(blobs)


def _real(folder: Path) -> Iterator[Path]:
    """Yield the folder, unless it is itself a link to elsewhere."""
    if os.path.realpath(folder) == str(Path(os.path.realpath(folder.parent)) / folder.name):
        yield Path(os.path.realpath(folder))


def _hub_cache() -> Path:
    """Return where huggingface_hub keeps repositories (its HF_HUB_CACHE), without importing it."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return expanded(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with the home of `~` or `~USER` written out; as it is where none is known, so that it is no file's.

    pathlib's own raises RuntimeError there, in the middle of whatever asks.
    """
    return Path(os.path.expanduser(path))


def files(folder: Path) -> list[Path]:
    """Return the paths of a folder's files by name, hidden ones too, each checked as `inside` does. No sub-folders."""
    return [path for path in sorted(Path(folder).iterdir()) if not path.is_dir() and inside(folder, path.name)]
