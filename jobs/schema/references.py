"""References in a pipeline file: to `${params.NAME}`, resolved on reading, and to `${phases.NAME.out}`.

Until folders are known, a reference to a phase reads `@{phases.NAME.out}`, a spelling that OmegaConf leaves alone.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_tools.mistake import nearest
from jobs.schema.problems import Problems

PARAM = re.compile(r"^\$\{params\.([A-Za-z0-9_]+)\}$")
WRITTEN = re.compile(r"\$\{phases\.([A-Za-z0-9_]+)\.out\}")  # as users write it
REFERENCE = re.compile(r"@\{phases\.([A-Za-z0-9_]+)\.out\}")  # as it stays until keys or folders are known
MISSING = re.compile(r"^Interpolation key '([^']+)' not found")  # what OmegaConf says
INNERMOST = re.compile(r"\$\{([^${}]*)\}")  # a reference that holds no other
OURS = re.compile(r"\s*(params|phases)[.\[][^:]*")  # what may stand in one: no call of OmegaConf's resolvers


def substitute(value: Any, folders: dict[str, str]) -> Any:
    """Return `value` with each `@{phases.NAME.out}` replaced by `folders[NAME]`, in strings and keys at any depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: substitute(getattr(value, f.name), folders) for f in dataclasses.fields(value)}
        )
    if isinstance(value, str):
        return REFERENCE.sub(lambda match: folders[match.group(1)], value)
    if isinstance(value, dict):
        return {substitute(key, folders): substitute(item, folders) for key, item in value.items()}
    if isinstance(value, list):
        return [substitute(item, folders) for item in value]
    return value


def references(value: Any) -> set[str]:
    """Return the names of the phases that `value` refers to, at any depth."""
    if isinstance(value, str):
        return set(REFERENCE.findall(value))
    if isinstance(value, dict):
        return set().union(*map(references, [*value, *value.values()])) if value else set()
    if isinstance(value, list):
        return set().union(*map(references, value)) if value else set()
    return set()


def foreign_reference(text: str) -> str:
    """Return the first `${…}` of a text that names no parameter and no phase, "" where there is none."""
    while match := INNERMOST.search(text):
        if not OURS.fullmatch(match[1]):
            return match[0]
        text = text[: match.start()] + "_" + text[match.end() :]
    return text[text.index("${") :] if "${" in text else ""


class Resolver:
    """Resolves every leaf of a pipeline file on its own, so that one bad reference does not hide the others."""

    def __init__(self, params: dict[str, Any], phases: Iterable[str], problems: Problems):
        """Resolve `params`, which may refer to each other and to phases, and then what refers to them."""
        self.phases, self.problems = list(phases), problems
        self.unresolved: set[str] = set()  # keys whose reference was refused: their None is no value of the user's
        self.params = params
        self.params = self._mapping("params", params)

    def resolve(self, key: str, value: Any) -> Any:
        """Return the value of a dotted key with its references resolved; problems are noted."""
        if isinstance(value, dict):
            return self._mapping(key, value)
        if isinstance(value, list):
            return [self.resolve(f"{key}[{i}]", item) for i, item in enumerate(value)]
        if value == "???":
            self.problems.note(key, "'???' stands for a value that is missing; give one")
            return None
        if isinstance(value, str) and (ours := REFERENCE.search(value)):
            self.problems.note(key, f"{ours[0]!r} is afterok's own spelling; write ${ours[0][1:]}")
            return None
        if isinstance(value, float) and not math.isfinite(value):  # no key can be made of it
            self.problems.note(key, f"{value} is not a finite number; give one")
        if value is not None and not isinstance(value, (bool, int, float, str)):  # of a tag, such as !!set
            self.problems.note(
                key, f"{value!r} is a {type(value).__name__}; give a text, a number, a list or a mapping"
            )
            return None
        return self._text(key, value) if isinstance(value, str) and "${" in value else value

    def _mapping(self, key: str, value: dict[Any, Any]) -> dict[str, Any]:
        """Return a mapping whose keys are text; they may hold references, too."""
        resolved: dict[str, Any] = {}
        for written, item in value.items():
            name = str(self.resolve(f"{key}.{written}", str(written)))
            if name in resolved:
                self.problems.note(f"{key}.{written}", f"stands for {name!r}, which stands there already")
            resolved[name] = self.resolve(f"{key}.{written}", item)
        return resolved

    def _text(self, key: str, value: str) -> Any:
        """Return what a text with references stands for; None, which is noted, where one refers to nothing."""
        known = [f"params.{name}" for name in self.params] + [f"phases.{name}.out" for name in self.phases]
        if foreign := value if "\\${" in value else foreign_reference(value):
            return self._refuse(key, foreign, known)
        for phase in WRITTEN.findall(value):
            if phase not in self.phases:
                self.problems.note(key, f"{value!r} refers to no phase {phase!r}{nearest(phase, self.phases)}")
                return value.replace("${", "@{")
        # The two common forms need no OmegaConf: a reference stays as it is, a parameter was resolved before.
        value = WRITTEN.sub(r"@{phases.\1.out}", value)
        param = PARAM.match(value)
        if "${" not in value:
            return value
        if param and key.startswith("phases.") and param.group(1) in self.params:
            return self.params[param.group(1)]
        phases = {name: {"out": f"@{{phases.{name}.out}}"} for name in self.phases}
        try:
            root = OmegaConf.create({"params": self.params, "phases": phases, "leaf": {"value": value}})
            leaf = OmegaConf.to_container(root.leaf, resolve=True)
        except OmegaConfBaseException as error:
            missing = MISSING.search(first_line(error))
            why = f": there is no {missing[1]}{self._beside(missing[1])}" if missing else f": {first_line(error)}"
            self.unresolved.add(key)
            self.problems.note(key, f"cannot resolve {value!r}{why}")
            return None
        assert isinstance(leaf, dict)
        resolved = leaf["value"]
        return self._refuse(key, resolved, known) if isinstance(resolved, str) and "${" in resolved else resolved

    def _beside(self, missing: str) -> str:
        """Return the nearest of the names that stand where a missing dotted name would."""
        *above, last = missing.split(".")
        inside: Any = {"params": self.params, "phases": dict.fromkeys(self.phases, {"out": ""})}
        for part in above:
            inside = inside.get(part) if isinstance(inside, dict) else None
        return nearest(last, [str(name) for name in inside]) if isinstance(inside, dict) else ""

    def _refuse(self, key: str, reference: str, known: list[str]) -> None:
        """Refuse OmegaConf's resolvers, such as oc.env: what they give would stand in the run's files."""
        self.unresolved.add(key)
        hint = "" if ":" in reference else nearest(reference.strip("${}"), known)
        self.problems.note(
            key,
            f"{reference!r} is no reference{hint}: a pipeline has ${{params.NAME}} and "
            "${phases.NAME.out}; a variable reaches the jobs by the profile's env.set or env.forward, a "
            "secret by its env.secrets",
        )


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or what it is."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
