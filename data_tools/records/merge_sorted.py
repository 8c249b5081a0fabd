"""JSONL files, each in the order of a key, read as one in that order, however many there are.

Few are open at a time (base/open_cache.py): of more, groups are merged into files of a scratch folder first, and those
again. That costs the size of the files once more on the disk, for up to 4,096 of them.
"""

import contextlib
import heapq
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.base.open_cache import OPEN_AT_ONCE

Records = Iterator[dict[str, Any]]


@contextlib.contextmanager
def merged(
    files: Sequence[Path], read: Callable[[Path], Records], key: Callable[[dict[str, Any]], Any], scratch: Path
) -> Iterator[Callable[[], Records]]:
    """Give a function that reads the records of all files in the order of `key`; of equal ones those of the first file
    first. `read` yields those of one file. What is merged on the way lies in the folder `scratch` meanwhile.
    """
    with contextlib.ExitStack() as folders:
        while len(files) > OPEN_AT_ONCE:
            folder = Path(folders.enter_context(tempfile.TemporaryDirectory(prefix=".merging", dir=scratch)))
            groups = [files[start : start + OPEN_AT_ONCE] for start in range(0, len(files), OPEN_AT_ONCE)]
            files = [folder / f"{number}.jsonl" for number in range(len(groups))]
            for file, group in zip(files, groups):
                with open(file, "w", encoding="utf-8") as lines:
                    lines.writelines(json.dumps(row) + "\n" for row in heapq.merge(*map(read, group), key=key))
        yield lambda: heapq.merge(*map(read, files), key=key)
