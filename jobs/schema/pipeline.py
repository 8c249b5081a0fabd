"""The pipeline file: schema, dotted overrides, interpolation, and every check that needs no cluster.

    name: tiny
    params: {pack_length: 416}
    phases:
      pack:
        uses: pack                                  # jobs/phases/pack.py, or a dotted module of the user's
        needs: [other, {more: aftercorr}]           # afterok unless it says otherwise (NEED_TYPES)
        with: {store: "${phases.materialize.out}", pack_length: "${params.pack_length}"}
        array: 4                                    # or a list of values, one element each
        throttle: 2                                 # elements that may run at once
        resources: {role: cpu, time: "0:30:00"}

Loading collects all violations, each with file, key and value, and raises them together as one UserMistake.
"""

import dataclasses
import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_tools.base.yaml_loaders import read_values
from data_tools.mistake import Problem, UserMistake, nearest
from jobs.kind import PhaseKind, find_kind, kind_names
from slurm.profile.schema import Request

NAME = re.compile(r"^[a-z][a-z0-9_]{0,40}\Z")  # not $, which a newline may follow
PARAM = re.compile(r"^\$\{params\.([A-Za-z0-9_]+)\}$")
WRITTEN = re.compile(r"\$\{phases\.([A-Za-z0-9_]+)\.out\}")  # as users write it
REFERENCE = re.compile(r"@\{phases\.([A-Za-z0-9_]+)\.out\}")  # as it stays until keys or folders are known
INNERMOST = re.compile(r"\$\{([^${}]*)\}")  # a reference that holds no other
OURS = re.compile(r"\s*(params|phases)[.\[][^:]*")  # what may stand in one: no call of OmegaConf's resolvers
DEFAULT_ROLE = "cpu"
RESERVED_NAMES = ("params", "name", "cluster", "phases", "on_code_change", "submissions", "local")
# Slurm's words, said of phases and seals: afterok once it is sealed, aftercorr each element once its partner is,
# afterany once it ended, afternotok if it ended unsealed (and never if it is sealed), singleton never while it runs.
NEED_TYPES = ("afterok", "aftercorr", "afterany", "afternotok", "singleton")
NEED_SEALS = ("afterok", "aftercorr")  # which cannot go on without the upstream's seal
ON_CODE_CHANGE = ("report", "rerun")
TOP_KEYS = ("name", "params", "phases", "on_code_change")
PHASE_KEYS = ("uses", "needs", "with", "array", "throttle", "resources")


@dataclass(frozen=True)
class Need:
    phase: str
    type: str = "afterok"


@dataclass
class Phase:
    """One phase with its parameters resolved; references to other phases read `@{phases.NAME.out}`."""

    name: str
    uses: str
    needs: list[Need]
    settings: dict[str, Any]
    config: Any  # the settings as the kind's Config
    array: list[Any] | int | None
    throttle: int  # elements that may run at once; 0: as many as fit
    resources: Request
    kind: PhaseKind

    @property
    def elements(self) -> int:
        if self.array is None:
            return 1
        return self.array if isinstance(self.array, int) else len(self.array)

    def value(self, index: int) -> Any:
        """The array value of one element: its list entry, else its index."""
        return self.array[index] if isinstance(self.array, list) else index


@dataclass
class Pipeline:
    name: str
    source: str
    params: dict[str, Any]
    phases: dict[str, Phase]  # in an order in which every phase follows its needs
    on_code_change: str = "report"
    cluster: str = "auto"
    overrides: list[str] = field(default_factory=list)

    def descendants(self, name: str) -> set[str]:
        found: set[str] = set()
        for phase in self.phases.values():
            if any(need.phase == name or need.phase in found for need in phase.needs):
                found.add(phase.name)
        return found


def substitute(value: Any, folders: dict[str, str]) -> Any:
    """`value` with each reference `@{phases.NAME.out}` replaced by `folders[NAME]`, in strings and keys at any depth."""
    if dataclasses.is_dataclass(value):
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
    """Names of the phases that `value` refers to, at any depth."""
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


def typed_config(kind: PhaseKind, settings: dict[str, Any]) -> Any:
    """The phase's own Config dataclass instance, from settings that were checked before."""
    return OmegaConf.to_object(OmegaConf.merge(_defaults(kind.config), settings))


@functools.cache
def _defaults(schema: type) -> DictConfig:
    """Of a dataclass. To be merged with others, which leaves it as it is."""
    return OmegaConf.structured(schema)


def load_pipeline(path: Path, overrides: "list[str] | None" = None) -> Pipeline:
    """Read, override, resolve and check a pipeline file.

    Raises:
        UserMistake: with every violation found, each naming file (or the override), key and value.
    """
    return _Loader(Path(path), overrides or []).load()


class _Loader:
    def __init__(self, path: Path, overrides: list[str]):
        self.path, self.overrides = path, overrides
        self.overridden: set[str] = set()
        self.unresolved: set[str] = set()  # keys whose reference was refused: their None is no value of the user's
        self.problems: list[Problem] = []

    def load(self) -> Pipeline:
        raw = self._read()
        cluster = self._apply_overrides(raw)
        self._unknown_keys(raw, TOP_KEYS, "")
        name = raw.get("name")
        if not isinstance(name, str) or not NAME.match(name):
            self._problem("name", f"{name!r} is not a pipeline name (lower-case letters, digits, _)")
        on_code_change = raw.get("on_code_change", "report")
        if on_code_change not in ON_CODE_CHANGE:
            self._problem(
                "on_code_change", f"unknown value {on_code_change!r}{nearest(str(on_code_change), ON_CODE_CHANGE)}"
            )
        params = raw.get("params") or {}
        phases_raw = raw.get("phases")
        if not isinstance(params, dict):
            self._problem("params", f"{params!r} is not a mapping")
            params = {}
        if not isinstance(phases_raw, dict) or not phases_raw:
            self._problem("phases", f"{phases_raw!r} is not a mapping of at least one phase")
            phases_raw = {}
        # A reference to a phase resolves to itself, in a spelling that OmegaConf leaves alone from then on.
        scope = {"params": params, "phases": {str(p): {"out": f"@{{phases.{p}.out}}"} for p in phases_raw}}
        params = scope["params"] = self._resolve("params", params, scope)
        phases = {}
        for phase_name, body in phases_raw.items():
            phase = self._phase(str(phase_name), body, scope, [str(p) for p in phases_raw])
            if phase is not None:
                phases[phase.name] = phase
        ordered = self._order(phases)
        if self.problems:
            raise UserMistake(self.problems)
        return Pipeline(name, str(self.path.resolve()), params, ordered, on_code_change, cluster, list(self.overrides))

    # -- reading -------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Any]:
        try:
            raw = read_values(self.path.read_text())
        except FileNotFoundError:
            raise UserMistake(f"{self.path}: no such pipeline file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserMistake(f"{self.path}: cannot be read: {error}") from None
        except yaml.YAMLError as error:
            raise UserMistake(f"{self.path}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(raw, dict):
            raise UserMistake(f"{self.path}: a pipeline is a mapping of {', '.join(TOP_KEYS)}")
        return raw

    def _apply_overrides(self, raw: dict[str, Any]) -> str:
        """Write `a.b.c=value` into `raw`; the first word is `params`, a top key or a phase. Returns the cluster."""
        cluster = "auto"
        phases = raw.get("phases") if isinstance(raw.get("phases"), dict) else {}
        for override in self.overrides:
            key, separator, text = override.partition("=")
            parts = key.split(".")
            if not separator or not all(parts):
                self.problems.append(Problem(f"override {override!r}", "write it as dotted.key=value"))
                continue
            try:
                value = read_values(text)
            except yaml.YAMLError as error:
                message = f"the value is not valid YAML: {' '.join(str(error).split())}"
                self.problems.append(Problem(f"override {override!r}", message))
                continue
            if parts == ["cluster"]:
                cluster = str(value)
                continue
            if parts[0] in ("params", "name", "on_code_change"):
                target, path = raw, parts
            elif parts[0] in phases:
                target, path = phases, parts
            else:
                known = ["params", "cluster", *map(str, phases)]
                self.problems.append(
                    Problem(f"override {override!r}", f"no phase {parts[0]!r}{nearest(parts[0], known)}")
                )
                continue
            if parts[0] == "params" and len(parts) > 1 and parts[1] not in (raw.get("params") or {}):
                known = [str(name) for name in raw.get("params") or {}]
                self.problems.append(
                    Problem(f"override {override!r}", f"no param {parts[1]!r}{nearest(parts[1], known)}")
                )
                continue
            self.overridden.add(key if target is raw else f"phases.{key}")
            for part in path[:-1]:
                below = target.get(part)
                if not isinstance(below, dict):
                    below = target[part] = {}
                target = below
            target[path[-1]] = value
        return cluster

    # -- one phase -----------------------------------------------------------------------------------------------

    def _phase(self, name: str, body: Any, scope: dict, names: list[str]) -> Phase | None:
        key = f"phases.{name}"
        if not NAME.match(name) or name in RESERVED_NAMES:
            self._problem(
                key, f"{name!r} is not a phase name (lower-case letters, digits, _; not {', '.join(RESERVED_NAMES)})"
            )
            return None
        if not isinstance(body, dict):
            self._problem(key, f"{body!r} is not a mapping of {', '.join(PHASE_KEYS)}")
            return None
        self._unknown_keys(body, PHASE_KEYS, f"{key}.")
        body = self._resolve(key, body, scope)
        kind = self._kind(key, body.get("uses"))
        settings = body.get("with") or {}
        if not isinstance(settings, dict):
            self._problem(f"{key}.with", f"{settings!r} is not a mapping")
            settings = {}
        needs = self._needs(key, name, body.get("needs") or [], settings, names)
        resources = self._resources(f"{key}.resources", body.get("resources") or {})
        array = self._array(key, body.get("array"), kind)
        throttle = body.get("throttle") or 0
        if not isinstance(throttle, int) or throttle < 0:
            self._problem(f"{key}.throttle", f"{throttle!r} is not a number of elements that may run at once")
            throttle = 0
        if kind is None:
            return None
        config = self._structured(f"{key}.with", kind.config, settings)
        return Phase(name, str(body.get("uses")), needs, settings, config, array, throttle, resources, kind)

    def _resources(self, key: str, resources: Any) -> Request:
        if not isinstance(resources, dict):
            self._problem(key, f"{resources!r} is not a mapping")
            resources = {}
        return self._structured(key, Request, {"role": DEFAULT_ROLE, **resources}) or Request(DEFAULT_ROLE)

    def _kind(self, key: str, uses: Any) -> PhaseKind | None:
        if uses is None:
            self._problem(f"{key}.uses", f"missing: name a phase kind{nearest('', kind_names())}")
            return None
        try:
            kind = find_kind(str(uses))
        except UserMistake as mistake:
            self._problem(f"{key}.uses", str(mistake))
            return None
        if kind is None:
            self._problem(f"{key}.uses", f"unknown phase kind {uses!r}{nearest(str(uses), kind_names())}")
        return kind

    def _needs(self, key: str, name: str, needs: Any, settings: dict, names: list[str]) -> list[Need]:
        found: dict[str, Need] = {}
        entries = needs if isinstance(needs, list) else [needs]
        for entry in entries:
            pairs = list(entry.items()) if isinstance(entry, dict) else [(entry, "afterok")]
            for phase, kind in pairs:
                if phase not in names:
                    self._problem(f"{key}.needs", f"no phase {phase!r}{nearest(str(phase), names)}")
                elif kind not in NEED_TYPES:
                    self._problem(
                        f"{key}.needs.{phase}", f"unknown dependency type {kind!r}{nearest(str(kind), NEED_TYPES)}"
                    )
                else:
                    found[phase] = Need(phase, kind)
        for phase in sorted(references(settings)):
            if phase in names:
                found.setdefault(phase, Need(phase))
        return list(found.values())

    def _array(self, key: str, array: Any, kind: PhaseKind | None) -> list[Any] | int | None:
        """`array` by hand: OmegaConf knows no union of int and list."""
        if array is None:
            return None
        if (
            isinstance(array, bool)
            or not isinstance(array, (int, list))
            or (isinstance(array, int) and array < 1)
            or array == []
        ):
            self._problem(f"{key}.array", f"{array!r} is neither a number of elements (1 or more) nor a list of values")
            return None
        if kind is not None and not kind.can_split:
            self._problem(
                f"{key}.array", f"{array!r}: phase kind {kind.name} cannot be split into elements; remove `array`"
            )
            return None
        return array

    # -- helpers -------------------------------------------------------------------------------------------------

    def _resolve(self, key: str, value: Any, scope: dict) -> Any:
        """Interpolate every leaf on its own, so that one bad reference does not hide the others."""
        if isinstance(value, dict):
            return self._resolve_keys(key, value, scope)
        if isinstance(value, list):
            return [self._resolve(f"{key}[{i}]", item, scope) for i, item in enumerate(value)]
        if value == "???":
            self._problem(key, "'???' stands for a value that is missing; give one")
            return None
        if not isinstance(value, str) or "${" not in value:
            return value
        known = [f"params.{name}" for name in scope["params"]] + [f"phases.{name}.out" for name in scope["phases"]]
        if foreign := value if "\\${" in value else foreign_reference(value):
            return self._foreign(key, foreign, known)
        for reference in WRITTEN.findall(value):
            if reference not in scope["phases"]:
                self._problem(
                    key, f"{value!r} refers to no phase {reference!r}{nearest(reference, list(scope['phases']))}"
                )
                return value.replace("${", "@{")
        # The two common forms need no OmegaConf: a reference stays as it is, a parameter was resolved before.
        value = WRITTEN.sub(r"@{phases.\1.out}", value)
        param = PARAM.match(value)
        if "${" not in value:
            return value
        if param and key.startswith("phases.") and param.group(1) in scope["params"]:
            return scope["params"][param.group(1)]
        try:
            root = OmegaConf.create({**scope, "leaf": {"value": value}})
            found = OmegaConf.to_container(root.leaf, resolve=True)["value"]
            return self._foreign(key, found, known) if isinstance(found, str) and "${" in found else found
        except OmegaConfBaseException as error:
            word = re.search(r"\$\{([^}]*)\}", value)
            self._problem(
                key,
                f"cannot resolve {value!r}{nearest(word.group(1) if word else value, known)}"
                if word
                else f"cannot resolve {value!r}: {_first_line(error)}",
            )
            return None

    def _foreign(self, key: str, reference: str, known: list[str]) -> None:
        """Refuse OmegaConf's resolvers, such as oc.env: what they give would stand in the run's files."""
        self.unresolved.add(key)
        hint = "" if ":" in reference else nearest(reference.strip("${}"), known)
        self._problem(
            key,
            f"{reference!r} is no reference{hint}: a pipeline has ${{params.NAME}} and "
            "${phases.NAME.out}; a variable reaches the jobs by the profile's env.set or env.forward, a "
            "secret by its env.secrets",
        )

    def _resolve_keys(self, key: str, value: dict, scope: dict) -> dict[str, Any]:
        """A mapping whose keys are text; they may hold references, too."""
        found: dict[str, Any] = {}
        for written, item in value.items():
            name = str(self._resolve(f"{key}.{written}", str(written), scope))
            if name in found:
                self._problem(f"{key}.{written}", f"stands for {name!r}, which stands there already")
            found[name] = self._resolve(f"{key}.{written}", item, scope)
        return found

    def _structured(self, key: str, schema: type, settings: Any) -> Any:
        """`settings` typed by the dataclass `schema`; every unknown key, wrong type and missing value is a problem."""
        if not isinstance(settings, dict):
            self._problem(key, f"{settings!r} is not a mapping")
            return None
        try:
            config = OmegaConf.merge(_defaults(schema), settings)
        except OmegaConfBaseException:  # key by key, so that one mistake does not hide the others
            config = OmegaConf.merge(_defaults(schema), self._typed_keys(key, schema, settings))
        missing = sorted(OmegaConf.missing_keys(config))
        for name in missing:
            if name not in settings:
                self._problem(f"{key}.{name}", "missing: this value has no default")
        return None if missing else OmegaConf.to_object(config)

    def _typed_keys(self, key: str, schema: type, settings: dict) -> dict:
        fields = {f.name: f for f in dataclasses.fields(schema)}
        self._unknown_keys(settings, tuple(fields), f"{key}.")
        good = {}
        for name, value in settings.items():
            if name not in fields or f"{key}.{name}" in self.unresolved:
                continue
            nested = fields[name].type
            if dataclasses.is_dataclass(nested) and isinstance(value, dict):
                good[name] = self._typed_keys(f"{key}.{name}", nested, value)
                continue
            try:
                OmegaConf.merge(_defaults(schema), {name: value})
                good[name] = value
            except OmegaConfBaseException as error:
                expected = nested.__name__ if isinstance(nested, type) else str(nested).replace("typing.", "")
                self._problem(f"{key}.{name}", f"{value!r} is not of type {expected} ({_first_line(error)})")
        return good

    def _unknown_keys(self, value: dict, known: tuple[str, ...], prefix: str) -> None:
        for key in value:
            if key not in known:
                self._problem(f"{prefix}{key}", f"unknown key{nearest(str(key), known)}")

    def _order(self, phases: dict[str, Phase]) -> dict[str, Phase]:
        ordered: dict[str, Phase] = {}
        waiting = dict(phases)
        while waiting:
            ready = [p for p in waiting.values() if all(n.phase not in waiting for n in p.needs)]
            if not ready:
                self._problem("phases", f"cycle: {' -> '.join(_cycle(waiting))}; a phase cannot wait for itself")
                break
            for phase in ready:
                ordered[phase.name] = waiting.pop(phase.name)
        return ordered

    def _problem(self, key: str, message: str) -> None:
        where = f"override {key.removeprefix('phases.')}" if key in self.overridden else f"{self.path}: {key}"
        self.problems.append(Problem(where, message))


def _cycle(waiting: dict[str, Phase]) -> list[str]:
    """One cycle among phases that all wait on each other, as names, the first repeated at the end."""
    name, seen = next(iter(waiting)), []
    while name not in seen:
        seen.append(name)
        name = next(need.phase for need in waiting[name].needs if need.phase in waiting)
    return [*seen[seen.index(name) :], name]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
