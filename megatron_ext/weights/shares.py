"""What processes that convert one model's weights together leave for the one that makes their shares a whole.

A share of weights is one file: its pieces, what they are as JSON, and in the last `ALIGNMENT` bytes where that begins
and how long it is. Whoever reads a checkpoint goes by the places of pieces, and never comes there.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from data_tools.base import digests, durable
from data_tools.base.digests import Part
from megatron_ext.weights import dist_weights
from megatron_ext.weights.dist_weights import Piece, Region

SHARE = "share.json"  # what one process tells the one that finishes, where its files have no room for it
WEIGHTS = "weights"
FILES = "*.distcp"


def writer_of(out: Path, index: int, count: int) -> dist_weights.Writer:
    """Return the writer of share `index` of `count` in OUT: a share lies there alone, all weights in OUT/weights."""
    return dist_weights.Writer(out if count > 1 else out / WEIGHTS, index)


def close(writer: dist_weights.Writer, told: dict[str, Any]) -> None:
    """Close a share's file with what the share tells, for `read` and `finish_weights`. What was hashed while it was
    written stands beside it: no seal reads it again.
    """
    share = {**told, "pieces": [astuple(piece) for piece in writer.written]}
    place = writer.append(durable.canonical_json(durable.with_sum(share)).encode())
    writer.append(" ".join(map(str, place)).encode().rjust(dist_weights.ALIGNMENT))
    part = writer.close()
    digests.write(writer.path.parent, {writer.name: [part]})


def read(part: Path) -> dict[str, Any]:
    """Return what the share of weights in `part` tells. Raises durable.TornFile."""
    if (part / SHARE).exists():  # of before
        return durable.read_json(part / SHARE)
    (path,) = [*part.glob(FILES), *part.glob(f"{WEIGHTS}/{FILES}")]
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - dist_weights.ALIGNMENT))
        place = file.read().split()
        if len(place) != 2 or not all(map(bytes.isdigit, place)):
            raise durable.TornFile(f"{path} does not end as a share of weights does")
        file.seek(int(place[0]))
        return durable.parse_checked(file.read(int(place[1])), path)


def finish_weights(parts: Sequence[Path], shares: Sequence[dict[str, Any]], out: Path) -> None:
    """Make OUT/weights of all parts, which told their `shares`, a checkpoint."""
    written: dict[str, list[Part]] = digests.told_below(out / WEIGHTS) if out in parts else {}
    gather(parts, out, FILES, WEIGHTS)
    gather(parts, out, f"{WEIGHTS}/{FILES}", WEIGHTS)  # those of before
    told = dist_weights.finish(out / WEIGHTS, (piece_of(row) for share in shares for row in share["pieces"]))
    for share in shares:  # of the others the seals of elements tell it
        written |= {name: [(part[0], part[1])] for name, part in share.get("written", {}).items()}
    digests.write(out / WEIGHTS, told | written)


def piece_of(row: Sequence[Any]) -> Piece:
    (key, *shapes), *rest = row
    return Piece(Region(key, *map(tuple, shapes)), *rest)


def gather(parts: Sequence[Path], out: Path, pattern: str, below: str = "") -> None:
    """Bring the files of all shares into OUT, or a folder `below` it: hard links, or copies where there are none."""
    for part in parts:
        for path in part.glob(pattern) if part != out else ():
            target = out / below / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
                durable.fsync_file(target)  # as its writer did with the other
