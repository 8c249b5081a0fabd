"""What processes that convert one model's weights together leave for the one that makes their shares a whole."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from data_tools.base import digests, durable
from megatron_ext.weights import dist_weights
from megatron_ext.weights.dist_weights import Piece, Region

SHARE = "share.json"  # what one process tells the one that finishes
WEIGHTS = "weights"


def told_of(writer: dist_weights.Writer, folder: Path) -> dict[str, Any]:
    """Close a writer into `folder` and return what a share tells of it, for `finish_weights`. What was hashed while it
    was written stands in the folder too: no seal reads it again.
    """
    part = writer.close()
    digests.write(folder, {writer.name: [part]})
    return {"pieces": [astuple(piece) for piece in writer.written], "written": {writer.name: part}}


def finish_weights(parts: Sequence[Path], shares: Sequence[dict[str, Any]], out: Path) -> None:
    """Make OUT/weights of all parts, which told their `shares`, a checkpoint."""
    gather(parts, out, f"{WEIGHTS}/*.distcp")
    told = dist_weights.finish(out / WEIGHTS, (piece_of(row) for share in shares for row in share["pieces"]))
    for share in shares:  # those of before told nothing
        told |= {name: [(part[0], part[1])] for name, part in share.get("written", {}).items()}
    digests.write(out / WEIGHTS, told)


def piece_of(row: Sequence[Any]) -> Piece:
    (key, *shapes), *rest = row
    return Piece(Region(key, *map(tuple, shapes)), *rest)


def gather(parts: Sequence[Path], out: Path, pattern: str) -> None:
    """Bring the files of all shares into OUT: hard links, or copies where the filesystem has none."""
    for part in parts:
        for path in part.glob(pattern) if part != out else ():
            target = out / path.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
                durable.fsync_file(target)  # as its writer did with the other
