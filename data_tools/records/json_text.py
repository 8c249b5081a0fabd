"""JSON text read strictly (an object that has a key twice is refused, since it leaves open what it says), and written
as the lines of JSON Lines."""

import json
from collections.abc import Callable
from typing import Any


class RepeatedKey(ValueError):
    """Raised for a JSON object that has a key twice, which leaves open what it says."""


def json_value(text: str) -> Any:
    """Return the value of a JSON text. Raise ValueError with the reason where there is none, or a key stands twice."""
    try:
        return _DECODER.decode(text)
    except RepeatedKey:
        raise
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {_told(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


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
