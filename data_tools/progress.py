"""How long work tells its progress without knowing who watches.

A function that takes long accepts `progress: Progress` and calls it; the worker prints plain lines into the log,
a terminal command draws a bar. The default says nothing.
"""

from typing import Protocol


class Progress(Protocol):
    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None:
        """`done` of `total` `unit`s (rows, steps, tensors, prompts); `note` is a short free text."""


def silent(done: int, total: int, unit: str, note: str = "") -> None:
    """The default: nobody watches."""
