"""How long work tells its progress without knowing who watches, and how it is asked to stop without knowing why.

A function that takes long accepts `progress: Progress` and calls it; the worker prints plain lines into the log,
a terminal command draws a bar. The default says nothing. One that can go on later from what it made durable accepts
`stop: Stop` too, asks it often, and raises `Stopped` once all it did is durable. The default never asks for that.
"""

from collections.abc import Callable
from typing import Protocol

Stop = Callable[[], bool]


class Progress(Protocol):
    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None:
        """`done` of `total` `unit`s (rows, steps, tensors, prompts); `note` is a short free text."""


def silent(done: int, total: int, unit: str, note: str = "") -> None:
    """Tell nobody: the default."""


def never() -> bool:
    """Return False: the default, where nobody asks for a stop."""
    return False


def counted(done: float) -> str:
    """Return a number as messages have it: 1,234 or 12.25."""
    return f"{done:,.2f}".removesuffix(".00")


class Stopped(Exception):
    """Work was asked to stop and did: `done` of `total` `unit`s (singular: step, row) are durable, the rest is not.

    `done` may be a fraction where a unit takes long and is durable in parts: who watches for progress compares it.
    """

    def __init__(self, done: float, total: int, unit: str = "step"):
        self.done, self.total, self.unit = done, total, unit
        super().__init__(
            f"stopped after a durable checkpoint at {unit} {counted(done)} of {total:,}"
            if done
            else f"stopped before the first {unit} of {total:,} was durable"
        )


def stopping(progress: Progress, stop: Stop) -> Progress:
    """Return `progress` of one process whose work is not recorded: it leaves it where it is asked to stop."""

    def told(done: int, total: int, unit: str, note: str = "") -> None:
        progress(done, total, unit, note)
        if done < total and stop():
            raise Stopped(0, total, unit.removesuffix("s"))

    return told


# How a rank ends that no longer moves, and how the line in its log begins that says so: megatron_ext/training/watch.py.
EXIT_HUNG = 8
HUNG = "afterok: no step for"
# What an element says whose engine, in processes that are not ours, ended (megatron_ext/foreign).
ENGINE_DIED = "the sampling engine died"
