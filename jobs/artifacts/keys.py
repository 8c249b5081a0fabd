"""Keys: what decides a phase's result, and of what an input consists, as short digests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.mistake import UserMistake
from jobs.artifacts.hash_cache import HashCache

KEY_LENGTH = 16  # hexadecimal digits of a key: 64 bits, enough to tell the keys of one run apart


def key_of(material: dict[str, Any]) -> str:
    """Return a phase's key: a digest of everything that decides its result (config, array, upstream keys, inputs)."""
    return durable.sha256_bytes(durable.canonical_json(material))[:KEY_LENGTH]


def content_digest(path: Path, cache: HashCache, follow: bool = True) -> str:
    """Return the SHA-256 of a file's bytes, or of a folder's sorted (name, digest) pairs, behind links to folders
    too where they are to be followed: those of an image lead into the machine that runs it.

    Raise UserMistake where a file of it goes away meanwhile, or may not be read, and for a pipe or a device.
    """
    path = Path(path)
    try:
        if path.is_file():
            return cache.sha256(path)
        names = sorted(_files(path, follow))
        told = "\n".join(f"{p.relative_to(path)} {cache.sha256(p)}" for p in names)
        return durable.sha256_bytes(os.fsencode(told))  # a name need not be Unicode
    except NotADirectoryError:  # neither a file nor a folder
        raise UserMistake(f"{path} is a pipe or a device, which may never end; give a file") from None
    except (FileNotFoundError, PermissionError) as error:
        told = f"{error.filename}: {error.strerror}"
        raise UserMistake(f"{path} cannot be read as it stands ({told}); wait for what writes it, or mend it") from None


def _files(folder: Path, follow: bool, within: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the files below a folder, those of linked ones under the links' names; none of a folder within itself.

    `within` are the real paths of those that it lies in.
    """
    own = os.path.realpath(folder)
    for path in folder.iterdir() if own not in within else ():
        if path.is_dir():
            yield from _files(path, follow, (*within, own)) if follow or not path.is_symlink() else ()
        elif path.is_file():
            yield path
