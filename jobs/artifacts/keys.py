"""Keys: what decides a phase's result, and of what an input consists, as short digests."""

from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.mistake import UserMistake
from jobs.artifacts.hash_cache import HashCache

KEY_LENGTH = 16  # hexadecimal digits of a key: 64 bits, enough to tell the keys of one run apart


def key_of(material: dict[str, Any]) -> str:
    """Return a phase's key: a digest of everything that decides its result (config, array, upstream keys, inputs)."""
    return durable.sha256_bytes(durable.canonical_json(material))[:KEY_LENGTH]


def content_digest(path: Path, cache: HashCache) -> str:
    """Return the SHA-256 of a file's bytes, or of a folder's sorted (name, digest) pairs.

    Raise UserMistake where a file of it goes away meanwhile, or may not be read.
    """
    path = Path(path)
    try:
        if path.is_file():
            return cache.sha256(path)
        names = sorted(p for p in path.rglob("*") if p.is_file())
        return durable.sha256_bytes("\n".join(f"{p.relative_to(path)} {cache.sha256(p)}" for p in names))
    except (FileNotFoundError, PermissionError) as error:
        told = f"{error.filename}: {error.strerror}"
        raise UserMistake(f"{path} cannot be read as it stands ({told}); wait for what writes it, or mend it") from None
