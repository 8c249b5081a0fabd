"""One sweep for every door: a place where bytes that somebody else made become values.

Valid inputs are damaged (damage.py) and read. A fault is
    a traceback      anything but the door's own mistakes
    a hang           more than HANG_S of this process's time
    lost damage      what was read means what the undamaged input means, though an independent reader finds another
                     meaning in the damaged bytes: a key that stood twice, a value that was read over
    altered          of a door with a sum (`told` is None): what was read means anything else than the undamaged input

`python -m pytest tests/doors` tries CASES of each door, `-m soak` MANY.
"""

import json
import random
import resource
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from data_tools.base.durable import TornFile
from data_tools.mistake import UserMistake
from tests.doors.damage import damaged

CASES, MANY = 200, 10_000
HANG_S = 60.0  # of CPU: a hundred times what the slowest case takes
OURS: tuple[type[BaseException], ...] = (UserMistake, TornFile)

counts = pytest.mark.parametrize("cases", [CASES, pytest.param(MANY, marks=pytest.mark.soak)])


class Refused(Exception):
    """Raised by a door's `read` where it gives problems instead of raising: the lines that the user is told."""


class Hang(BaseException):
    """Raised into a case that takes too long."""


@dataclass(frozen=True)
class Door:
    """A place where input is read."""

    name: str
    inputs: Sequence[bytes]  # valid ones
    read: Callable[[bytes], Any]  # the meaning of an input: equal for equal ones; raises what the door raises
    told: Callable[[bytes], Any] | None  # the same by another reader, as exactly as bytes tell it; None: it has a sum
    refused: tuple[type[BaseException], ...] = OURS
    damage: Callable[[bytes, random.Random], tuple[str, bytes]] = damaged
    one_line: bool = True  # of each problem that it tells


@dataclass
class Swept:
    """What a sweep met."""

    cases: int = 0
    refused: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def sweep(door: Door, cases: int, most_faults: int = 8) -> Swept:
    """Read so many damaged inputs of a door; the draw is the same each time."""
    draw, swept = random.Random(door.name), Swept()
    wholes = [(whole, _same(door.read(whole)), door.told and _told(door, whole)) for whole in door.inputs]
    began = resource.getrusage(resource.RUSAGE_SELF)
    before = signal.signal(signal.SIGVTALRM, _hang)
    try:
        for number in range(cases):
            whole, meaning, told = draw.choice(wholes)
            how, data = door.damage(whole, draw)
            swept.cases += 1
            if fault := _fault(door, data, meaning, told, swept):
                swept.faults.append(f"{door.name}, case {number} ({how}): {fault}\n    {_shown(whole, data)}")
                if len(swept.faults) >= most_faults:
                    break
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    ended = resource.getrusage(resource.RUSAGE_SELF)
    swept.seconds = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    return swept


def check(door: Door, cases: int, record: Callable[[str, object], None]) -> None:
    """Sweep a door and hold that there is no fault; that damage is met at all is held, too."""
    swept = sweep(door, cases)
    told = f"{swept.cases} cases, {swept.refused} refused, {swept.seconds:.1f} s"
    print(f"{door.name}: {told}, {len(swept.faults)} faults")
    record(door.name, told)
    assert not swept.faults, "\n".join(swept.faults)
    assert swept.refused * 20 > swept.cases


def _fault(door: Door, data: bytes, meaning: str, told: str | None, swept: Swept) -> str:
    """Return what is wrong with how an input was read, "" where nothing is."""
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)
    try:
        found = _same(door.read(data))
    except (*door.refused, Refused) as mistake:
        swept.refused += 1
        lines = getattr(mistake, "problems", None) or [mistake]
        broken = [line for line in lines if door.one_line and "\n" in str(line)]
        return f"more than one line: {str(broken[0])!r:.300}" if broken else ""
    except Hang:
        return "a hang"
    except BaseException as error:  # a SystemExit, too
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"a traceback: {''.join(traceback.format_exception(error)[-4:])}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if door.told is None:
        return "" if found == meaning else "altered, and read all the same"
    if found == meaning and _told(door, data) != told:
        return "lost damage: it is read as though it were not there"
    return ""


def _shown(whole: bytes, data: bytes) -> str:
    """Return what was damaged with some of what stands around it."""
    first = next((place for place, (a, b) in enumerate(zip(whole, data)) if a != b), min(len(whole), len(data)))
    start = max(0, first - 60)
    return f"of {whole[start : start + 200]!r}\n    is {data[start : start + 200]!r} ({len(whole)}, {len(data)} bytes)"


def _told(door: Door, data: bytes) -> str:
    """Return what the independent reader finds; that there is nothing to be read is another meaning, too."""
    assert door.told is not None
    try:
        return _same(door.told(data))
    except Exception as error:
        return f"unreadable: {type(error).__name__}"


def _same(value: Any) -> str:
    """Return one spelling of a meaning: 1, 1.0, true and "1" are four."""
    return repr(value) if not isinstance(value, (dict, list)) else json.dumps(value, sort_keys=True, default=repr)


def _hang(signum: int, frame: Any) -> None:
    raise Hang
