"""What the first line of a file of gathered outcomes says of them (consolidate.py), so that few of them are read."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

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
