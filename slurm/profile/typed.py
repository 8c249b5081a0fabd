"""Reads the mapping of text that a profile's YAML is into its dataclasses, naming every mistake with file and key."""

import dataclasses
from typing import Any, get_args, get_origin, get_type_hints

from data_tools.mistake import Problem, nearest
from slurm.profile.schema import Profile

NOTHING = ("", "null", "~")  # YAML's ways to write no value
ADD = "+"  # before the key of a list: more entries, behind those of the files that are extended


def typed(schema: type, values: dict[str, Any], file: str, at: str, problems: list[Problem]) -> Any:
    """Make a dataclass from a mapping of text; each unknown key and each value of a wrong type becomes a problem.

    `at` is the place inside `file`, such as "partitions.gpu.".
    """
    from data_tools.base.yaml_loaders import Nothing  # here: to find a cluster must not cost an import of yaml

    hints = get_type_hints(schema)
    result = schema()
    for key, value in values.items():
        place = f"{file}: {at}{key}"
        if key.startswith(ADD) and get_origin(hints.get(key[1:])) is list:
            key = key[1:]  # nothing was extended that it could be added to
        if key not in hints:
            message = f"unknown key{nearest(key, list(hints))}"
            problems.append(Problem(place, message))
            continue
        hint = hints[key]
        if key == "set" and isinstance(value, dict):
            message = 'no value is written; write "" for an empty one, or take the line out'
            empty = [name for name, entry in value.items() if isinstance(entry, Nothing)]
            problems += [Problem(f"{place}.{name}", message) for name in empty]
        inner = get_args(hint)[1] if get_origin(hint) is dict else None
        try:
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                made = typed(hint, _mapping(value), file=file, at=f"{at}{key}.", problems=problems)
            elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
                made = {}
                for name, entry in _mapping(value).items():
                    place = f"{file}: {at}{key}.{name}"
                    made[name] = typed(inner, _mapping(entry), file=file, at=f"{at}{key}.{name}.", problems=problems)
            else:
                made = _leaf(hint, value)
            setattr(result, key, made)
        except ValueError as error:
            problems.append(Problem(place, str(error)))
    return result


def _mapping(value: Any) -> dict[str, Any]:
    """Return a mapping as it is, and an empty one for no value.

    Raises:
        ValueError: it is something else.
    """
    if value in NOTHING:
        return {}  # `cpu:` with nothing below takes the defaults
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a mapping of keys to values")
    return value


def _leaf(hint: Any, value: Any) -> Any:
    """Return the text, list or mapping as the type `hint` wants it.

    Raises:
        ValueError: it is something else; the message shows the value.
    """
    if type(None) in get_args(hint):
        return None if value in NOTHING else _leaf(get_args(hint)[0], value)
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{value!r} is not a list; write [{value if isinstance(value, str) else '...'}]")
        return [_leaf(get_args(hint)[0], item) for item in value]
    if get_origin(hint) is dict:
        return {key: _leaf(get_args(hint)[1], item) for key, item in _mapping(value).items()}
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not one value")
    if hint is bool:
        if value not in ("true", "false"):
            raise ValueError(f"{value!r} is neither true nor false")
        return value == "true"
    if hint is int:
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"{value!r} is not an integer") from None
    return str(value)


def is_place(parts: list[str]) -> bool:
    """Return whether a profile has a place of this dotted key, "*" standing for any one name."""
    hint: Any = Profile
    for part in parts:
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            hints = get_type_hints(hint)
            if part not in hints:
                return False
            hint = hints[part]
        elif get_origin(hint) is dict:
            hint = get_args(hint)[1]
        else:
            return False
    return True
