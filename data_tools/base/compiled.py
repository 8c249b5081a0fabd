"""Functions that numba compiles, compiled once a user: a job runs a copy of our sources, and numba's own cache, which
lies beside a source, would begin anew with each submission.

In ~/.cache/afterok/compiled, a file for each function, signature and CPU, named by a digest of these, of the source
file and of numba's version. numba numbers its files instead, so that of two processes which compile two signatures of
a function at once each may take the other's code. A file that is torn, or cannot be written, is no error.
"""

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

from data_tools.base import durable


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator like `numba.njit(cache=True, **options)`, whose cache all copies of a source share."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        with contextlib.suppress(RuntimeError):  # numba finds no folder to write into
            dispatcher._cache = _Cache(function)  # as its enable_caching does with a FunctionCache
        return dispatcher

    return decorate


class _Cache(FunctionCache):
    """Is numba's cache of a function with other files."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__(function)
        source = f"{function.__module__} {function.__qualname__} {self._impl.locator.get_source_stamp()!r}"
        self._cache_file: Any = _Files(durable.cache_folder("compiled"), f"{numba.__version__} {source}")


class _Files:
    """Holds compiled code by numba's keys: signature, CPU, digests of the function's bytes and of what it encloses."""

    def __init__(self, folder: Path, source: str):
        self.folder, self.source = folder, source

    def _path(self, key: Any) -> Path:
        return self.folder / f"{durable.sha256_bytes(f'{self.source} {key!r}')}.pickle"

    def load(self, key: Any) -> Any:
        """Return what was saved under this key; None where nothing was, or somebody else could have written it."""
        with contextlib.suppress(Exception):  # whatever a torn pickle raises
            folder = self.folder.stat()
            if folder.st_uid == os.geteuid() and not folder.st_mode & 0o022:
                return pickle.loads(self._path(key).read_bytes())
        return None

    def save(self, key: Any, data: Any) -> None:
        """Write a file, whole or not at all."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            durable.write_file(self._path(key), dumps(data))

    def flush(self) -> None:
        """Forget nothing: other sources' code lies in the same folder."""
