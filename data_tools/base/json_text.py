"""JSON text read strictly (an object that has a key twice is refused, since it leaves open what it says, and so is what
is nested deeper than whoever goes through it could go), and written as the lines of JSON Lines."""

import json
import sys
from collections.abc import Callable
from typing import Any

from data_tools.base.bounds import JSON_DEPTH

_DIGITS = "integer string conversion"  # what Python says of an integer with too many of them


class RepeatedKey(ValueError):
    """Raised for a JSON object that has a key twice, which leaves open what it says."""


def json_value(text: str) -> Any:
    """Return the value of a JSON text. Raise ValueError with the reason where there is none, where a key stands twice,
    and where it is nested deeper, or has an integer of more digits, than is read."""
    most = JSON_DEPTH.most
    try:
        value = _DECODER.decode(text)
    except RepeatedKey:
        raise
    except RecursionError:
        raise ValueError(f"not read: {JSON_DEPTH.exceeded()}") from None
    except ValueError as error:
        if _DIGITS in str(error):
            most_digits = f"more than {sys.get_int_max_str_digits():,} digits in an integer, the most that is read"
            raise ValueError(f"not read: {most_digits}; PYTHONINTMAXSTRDIGITS raises it") from None
        raise ValueError(f"not JSON: {_told(error) if isinstance(error, json.JSONDecodeError) else error}") from None
    if text.count("[") + text.count("{") > most and is_deeper(value, most):
        raise ValueError(f"not read: {JSON_DEPTH.exceeded()}")
    return value


def is_deeper(value: Any, levels: int) -> bool:
    """Return whether lists and mappings lie deeper within each other than so many levels."""
    layer = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        inner = [item for each in layer for item in (each.values() if isinstance(each, dict) else each)]
        layer = [item for item in inner if isinstance(item, (dict, list))]
        if not layer:
            return False
    return bool(layer)


def _told(error: json.JSONDecodeError) -> str:
    """Return what is wrong and where: the line of a text of several, of one line the column alone, since whoever read
    that line knows its number in the file."""
    text = error.doc.rstrip()
    place = min(error.pos, len(text))
    column = place - (text.rfind("\n", 0, place) + 1) + 1
    line = f"line {text.count(chr(10), 0, place) + 1}, " if "\n" in text else ""
    return f"{error.msg} at {line}column {column}"


def json_line(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Return a value as a line of JSON Lines; half of a surrogate pair, which UTF-8 lacks, stays as JSON spells it.

    `default` gives what stands for what JSON lacks, such as a date. Raise TypeError where there is none.
    """
    text = json.dumps(value, ensure_ascii=False, default=default)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, default=default)
    return f"{text}\n"


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise RepeatedKey(f"the key {twice!r} stands twice in one object")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object_of)
