"""Lays profiles upon one another: site, team, user, command line. A later value wins, and it is known whose it is.

yaml is imported where it is used: `afterok --help` must not pay for it.

Mappings are merged key by key; lists and single values replace what was there, and `+key: [...]` adds to a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.base.bounds import NoFile
from data_tools.mistake import Problem, UserMistake
from slurm.profile.typed import ADD

COMMAND_LINE = "the command line"
ON_COMMAND_LINE = "cluster."  # how an override of a profile's value begins


@dataclass(frozen=True)
class Layer:
    """One file's values, all still text, or those of the command line or of a cluster that was asked."""

    file: str
    values: dict[str, Any]
    is_admins: bool = False
    why_not: str = ""  # why the file is not an admin's
    below: frozenset[str] = frozenset()  # the files that it extends, and those that these do


@dataclass
class Merged:
    """The values of several layers, and the file that set each."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, list[str]] = field(default_factory=dict)  # dotted key -> file; of a list that was added to, all

    def add(self, layer: Layer) -> None:
        """Lay a layer's values on top."""
        self._lay(self.values, layer.values, at="", file=layer.file)

    def origin(self, key: str) -> str:
        """Return the file that set a key, or the nearest key above; of a list that was added to, all; "" for none."""
        return " and ".join(self._files(key))

    def culprit(self, key: str) -> str:
        """Return the file that changed a key last, "" where none did."""
        return next(reversed(self._files(key)), "")

    def _files(self, key: str) -> list[str]:
        parts = key.split(".")
        tries = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        found = next((self.origins[some] for some in tries if some in self.origins), [])
        return found or next((files for some, files in self.origins.items() if some.startswith(f"{key}.")), [])

    def _lay(self, below: dict[str, Any], values: dict[str, Any], at: str, file: str) -> None:
        for key, value in sorted(values.items(), key=lambda pair: pair[0].startswith(ADD)):
            if key.startswith(ADD) and isinstance(value, list):
                key = key.removeprefix(ADD)
                before = below.get(key)
                if isinstance(before, list) and before:
                    below[key] = before + value
                    self.origins[f"{at}{key}"] = [*self.origins[f"{at}{key}"], file]
                    continue
            place = f"{at}{key}"
            if isinstance(value, dict):
                if not isinstance(below.get(key), dict):
                    below[key] = {}
                    self._forget(place)
                if not value:
                    self.origins.setdefault(place, [file])
                self._lay(below[key], value, at=f"{place}.", file=file)
            else:
                self._forget(place)
                below[key] = value
                self.origins[place] = [file]

    def _forget(self, place: str) -> None:
        for key in [key for key in self.origins if key == place or key.startswith(f"{place}.")]:
            del self.origins[key]


def merge(layers: list[Layer]) -> Merged:
    """Return the values of all layers, the first lowest."""
    merged = Merged()
    for layer in layers:
        merged.add(layer)
    return merged


def leaves(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of all that is no mapping."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= leaves(value, f"{at}{key}.") if isinstance(value, dict) else {f"{at}{key}": value}
    return flat


def read_values(path: Path, problems: list[Problem]) -> dict[str, Any]:
    """Return the file's mapping, every scalar still text: YAML 1.1 would read the time 1:30:00 as the number 5400."""
    import yaml

    from data_tools.base.yaml_loaders import TextLoader, load, read_file

    try:
        values = load(read_file(path), TextLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        told = str(getattr(error, "problem", None) or error)
        problems.append(Problem(f"{path}{line}", f"not readable as YAML: {' '.join(told.split())}"))
        return {}
    except NoFile as error:
        problems.append(Problem(str(path), str(error.strerror)))
        return {}
    if not isinstance(values, dict):
        problems.append(Problem(str(path), "a profile is a mapping with the keys partitions, roles, ..."))
        return {}
    return values


def command_line(overrides: Sequence[str]) -> Layer | None:
    """Return what the overrides `cluster.KEY=VALUE` among a pipeline's say, None where they say nothing of a profile.

    Raises:
        UserMistake: a value is no YAML.
    """
    import yaml

    from data_tools.base.yaml_loaders import TextLoader, read_typed

    values: dict[str, Any] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        if not key.startswith(ON_COMMAND_LINE):
            continue
        try:
            value = read_typed(text, TextLoader)
        except yaml.YAMLError as error:
            raise UserMistake(f"{override}: the value is not valid YAML: {' '.join(str(error).split())}") from None
        _put(values, key.removeprefix(ON_COMMAND_LINE).split("."), value)
    if "extends" in values:
        raise UserMistake("cluster.extends: only a file extends others; write one that does, and say cluster=FILE.yaml")
    return Layer(COMMAND_LINE, values, why_not="the command line is none") if values else None


def _put(values: dict[str, Any], parts: list[str], value: Any) -> None:
    """Write a value at a dotted place, laid upon what was said before; what is added to a list of a file stays so."""
    *way, last = parts
    for part in way:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    if isinstance(value, dict) and isinstance(values.get(last), dict):
        for key, entry in value.items():
            _put(values[last], [key], entry)
        return
    if last.startswith(ADD) and isinstance(value, list) and isinstance(values.get(last), list):
        value = values[last] + value
    values.pop(f"{ADD}{last}", None)
    values[last] = value
