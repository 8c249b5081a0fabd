"""What the first line of a file of gathered outcomes says of them (consolidate.py), so that few of them are read; and
what is an outcome at all."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.indices import Indices
from slurm.printed import format_indices, read_indices


@dataclass(frozen=True)
class Gathered:
    """Lives of elements that were gathered in one file: sealed, the only ones of their elements, of restart 0."""

    attempt: int
    elements: Indices
    started: float  # the first of them
    seconds: float  # of all of them


def gathered_line(gathered: Sequence[Gathered], others: int) -> str:
    """Return the first line of a file of gathered outcomes; those of the next `others` are in none of `gathered`."""
    told = [{**dataclasses.asdict(some), "elements": format_indices(some.elements)} for some in gathered]
    return durable.canonical_json(durable.with_sum({"gathered": told, "others": others})) + "\n"


def read_gathered(line: bytes) -> tuple[list[Gathered], int | None]:
    """Return what the first line of a file of gathered outcomes says; ([], None) of a file of before."""
    try:
        told = durable.parse_checked(line, "gathered outcomes")
        found = [Gathered(**{**some, "elements": read_indices(some["elements"])}) for some in told["gathered"]]
        return found, int(told["others"])
    except (ValueError, KeyError, TypeError):
        return [], None


def sums_up(path: Path, element: int, attempt: int) -> bool:
    """Return whether the first line of a file of gathered outcomes has this life of an element among its sums."""
    with open(path, "rb") as file:
        sums, _ = read_gathered(file.readline())
    return any(some.attempt == attempt and element in some.elements for some in sums)


_NUMBERS = {"element": 0, "attempt": 0, "restart": 0, "exit_code": 0, "started": 0.0, "ended": 0.0}
_TEXTS = ("state", "message", "host", "job", "key", "cause", "node")


def is_outcome(told: dict[str, Any]) -> bool:
    """Take the sum out of a file's object, and return whether it tells of an outcome.

    One with a sum is what was written; one of before there were sums need not be.
    """
    if told.pop(durable.SUM, None) is not None:
        return True
    numbers = [told.get(name, default) for name, default in _NUMBERS.items()]
    numbers += [told[name] for name in ("done", "total") if told.get(name) is not None]
    return all(isinstance(told.get(name, ""), str) for name in _TEXTS) and all(
        type(number) in (int, float) and abs(number) < 2**53 for number in numbers
    )
