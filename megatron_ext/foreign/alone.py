"""The part of a foreign Backend (rl/makers.py) that is the same for each: an element is one process."""

from typing import Any


class Alone:
    """The only process of an element: it writes, scores, and has nobody to tell."""

    is_writer = speaks = True

    def from_writer(self, value: Any) -> Any:
        """Return the value."""
        return value
