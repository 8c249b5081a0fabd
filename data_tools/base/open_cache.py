"""Many files of which few are open at a time: a process may have 1,024 open, on some systems 256."""

from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Protocol, TypeVar

OPEN_AT_ONCE = (
    64  # whatever merges the parts of an array keeps at most so many files open, however many parts there are
)


class Closes(Protocol):
    """Represents what can be closed."""

    def close(self) -> object: ...


Key = TypeVar("Key")
Opened = TypeVar("Opened", bound=Closes)


class OpenCache(Generic[Key, Opened]):
    """Opens what it is asked for, and closes the least recently used beyond `limit`."""

    def __init__(self, open_: Callable[[Key], Opened], limit: int = OPEN_AT_ONCE):
        self._open, self._limit = open_, limit
        self._opened: OrderedDict[Key, Opened] = OrderedDict()

    def __getitem__(self, key: Key) -> Opened:
        """Return what `key` names, open at least until `limit` others were asked for."""
        if key not in self._opened:
            while len(self._opened) >= self._limit:
                self._opened.popitem(last=False)[1].close()
            self._opened[key] = self._open(key)
        self._opened.move_to_end(key)
        return self._opened[key]

    def close(self) -> None:
        """Close all that is open."""
        while self._opened:
            self._opened.popitem()[1].close()

    def __enter__(self) -> "OpenCache[Key, Opened]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
