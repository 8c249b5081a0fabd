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
        when: "${params.packed}"                    # false: this phase is left out
    variables: {PACK_LENGTH: params.pack_length}    # environment variables that set values (variables.py)
    waive: [V001]                                   # checks whose findings do not stop it (slurm/checks.py)

Loading collects all violations, each with file, key and value, and raises them together as one UserMistake.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from data_tools.base.yaml_loaders import read_file, read_typed, read_values
from data_tools.mistake import UserMistake, nearest
from jobs.kind import PhaseKind, find_kind, kind_names
from jobs.schema.problems import Problems, no_such_pipeline
from jobs.schema.references import PARAM, Resolver, references
from jobs.schema.typed import structured, without_blocks
from jobs.schema.variables import Variable, beaten, declared, given
from slurm.profile.schema import DEFAULT_ROLE, Request

NAME = re.compile(r"^[a-z][a-z0-9_]{0,40}\Z")  # not $, which a newline may follow
MOST_ELEMENTS = 1_000_000  # each has files of its own
RESERVED_NAMES = ("params", "name", "cluster", "phases", "on_code_change", "submissions", "local")
# Slurm's words, said of phases and seals: afterok once it is sealed, aftercorr each element once its partner is,
# afterany once it ended, afternotok if it ended unsealed (and never if it is sealed), singleton never while it runs.
NEED_TYPES = ("afterok", "aftercorr", "afterany", "afternotok", "singleton")
NEED_SEALS = ("afterok", "aftercorr")  # which cannot go on without the upstream's seal
ON_CODE_CHANGE = ("report", "rerun")
TOP_KEYS = ("name", "params", "phases", "on_code_change", "variables", "waive")
PHASE_KEYS = ("uses", "needs", "with", "array", "throttle", "resources", "when")


@dataclass(frozen=True)
class Need:
    """A phase that another one needs, and how (NEED_TYPES)."""

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
        """The number of elements; 1 of a phase that is not split."""
        if self.array is None:
            return 1
        return self.array if isinstance(self.array, int) else len(self.array)

    def value(self, index: int) -> Any:
        """Return the array value of one element: its list entry, else its index."""
        return self.array[index] if isinstance(self.array, list) else index


@dataclass
class Pipeline:
    """A pipeline file as it was read, its overrides applied."""

    name: str
    source: str
    params: dict[str, Any]
    phases: dict[str, Phase]  # in an order in which every phase follows its needs
    on_code_change: str = "report"
    cluster: str = "auto"
    overrides: list[str] = field(default_factory=list)  # those of the command line
    variables: list[Variable] = field(default_factory=list)  # those that are set
    declared: dict[str, str] = field(default_factory=dict)  # all that may be: {variable: dotted key}
    rehearsed: float = 0.0  # of a rehearsal: the share of its planned time that each phase sleeps; 0: it is none
    waive: list[str] = field(default_factory=list)  # ids of checks, those of the command line included
    left_out: list[str] = field(default_factory=list)  # phases whose `when` is false

    def descendants(self, name: str) -> set[str]:
        """Return the phases that need a phase, directly or through others."""
        below: set[str] = set()
        for phase in self.phases.values():
            if any(need.phase == name or need.phase in below for need in phase.needs):
                below.add(phase.name)
        return below


def load_pipeline(
    path: Path, overrides: "list[str] | None" = None, environment: Mapping[str, str] | None = None
) -> Pipeline:
    """Read, override, resolve and check a pipeline file. Variables that it declares are read from `environment`.

    Raises:
        UserMistake: with every violation found, each naming file (or the override, or the variable), key and value.
    """
    return _Loader(Path(path), overrides or [], environment or {}).load()


class _Loader:
    """Reads one pipeline file and collects its problems."""

    def __init__(self, path: Path, overrides: list[str], environment: Mapping[str, str]):
        self.path, self.overrides, self.environment = path, overrides, environment
        self.problems = Problems(path)
        self.of_phases: list[tuple[list[str], Any]] = []  # (parts of a dotted key, value) of overrides, in their order
        self.left_out: list[str] = []  # phases whose `when` is false

    def load(self) -> Pipeline:
        """Return the pipeline. Raises UserMistake with all problems."""
        raw = self._read()
        names = declared(raw.get("variables") or {}, self.problems)
        variables = self._apply_variables(raw, names)
        cluster = self._apply_overrides(raw, [variable.override for variable in variables if variable.key == "cluster"])
        for parts, value in self.of_phases:
            self._put("phases.", _mapping(raw.get("phases")), parts, value, _mapping(raw.get("params")))
        self.problems.note_unknown_keys(raw, TOP_KEYS, "")
        name = raw.get("name")
        if not isinstance(name, str) or not NAME.match(name):
            self.problems.note("name", f"{name!r} is not a pipeline name (lower-case letters, digits, _)")
        on_code_change = raw.get("on_code_change", "report")
        if on_code_change not in ON_CODE_CHANGE:
            near = nearest(str(on_code_change), ON_CODE_CHANGE)
            self.problems.note("on_code_change", f"unknown value {on_code_change!r}{near}")
        waive = raw.get("waive") or []
        if not isinstance(waive, list) or not all(isinstance(check, str) for check in waive):
            self.problems.note("waive", f"{waive!r} is not a list of checks, such as [V001]")
            waive = []
        params, written = raw.get("params") or {}, raw.get("phases")
        if not isinstance(params, dict):
            self.problems.note("params", f"{params!r} is not a mapping")
            params = {}
        if not isinstance(written, dict) or not written:
            self.problems.note("phases", f"{written!r} is not a mapping of at least one phase")
            written = {}
        resolver = Resolver(params, map(str, written), self.problems)
        self._leave_out(written, resolver)
        phases = {}
        for phase_name, body in written.items():
            phase = self._phase(str(phase_name), body, resolver) if phase_name not in self.left_out else None
            if phase is not None:
                phases[phase.name] = phase
        ordered = self._order(phases)
        if self.problems.noted:
            raise UserMistake(self.problems.noted)
        return Pipeline(
            name=str(name),
            source=str(self.path.resolve()),
            params=resolver.params,
            phases=ordered,
            on_code_change=on_code_change,
            cluster=cluster,
            overrides=list(self.overrides),
            variables=variables,
            declared=names,
            waive=waive,
            left_out=[*self.left_out],
        )

    # -- reading -------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Any]:
        """Return what the file says. Raises UserMistake where it is no mapping in YAML."""
        try:
            raw = read_values(read_file(self.path))
        except FileNotFoundError:
            raise no_such_pipeline(self.path) from None
        except (OSError, ValueError) as error:  # ValueError: of a name with \0
            raise UserMistake(f"{self.path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        except yaml.YAMLError as error:
            raise UserMistake(f"{self.path}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(raw, dict):
            raise UserMistake(f"{self.path}: a pipeline is a mapping of {', '.join(TOP_KEYS)}")
        return raw

    def _apply_variables(self, raw: dict[str, Any], names: dict[str, str]) -> list[Variable]:
        """Write the variables that are set into `raw`, before the command line's overrides; return them."""
        for name, key in names.items():
            if key != "cluster" and (why := self._why_no_place(raw, key.split("."))):
                self.problems.note(f"variables.{name}", f"{key!r}: {why}")
        variables = []
        for variable in given(names, self.environment, self.problems):
            parts = variable.key.split(".")
            try:
                value = read_typed(variable.value)
            except yaml.YAMLError as error:
                why = " ".join(str(error).split())
                self.problems.note_variable(variable.name, f"{variable.value!r} is not valid YAML: {why}")
                continue
            variables.append(replace(variable, beaten_by=beaten(variable, self.overrides)))
            if parts != ["cluster"] and not self._why_no_place(raw, parts):
                self._write(raw, parts, value, f"variable {variable.name} ({variable.key})")
        return variables

    def _apply_overrides(self, raw: dict[str, Any], before: list[str]) -> str:
        """Write `a.b.c=value` into `raw`; the first word is `params`, a top key or a phase. Return the cluster.

        `before` are overrides of the cluster alone, which those of the command line beat.
        """
        cluster = "auto"
        for override in [*before, *self.overrides]:
            key, separator, text = override.partition("=")
            parts = key.split(".") if key.isprintable() else [""]  # no key has a line break
            if parts[0] == "cluster" and len(parts) > 1 and separator and all(parts):
                continue  # a value of the cluster's profile, not the pipeline's: slurm.detect.find_cluster takes it
            if not separator or not all(parts):
                self.problems.note_override(override, "write it as dotted.key=value")
                continue
            try:
                value = read_typed(text)
            except yaml.YAMLError as error:
                self.problems.note_override(override, f"the value is not valid YAML: {' '.join(str(error).split())}")
                continue
            if parts == ["cluster"]:
                cluster = str(value)
            elif why := self._why_no_place(raw, parts):
                self.problems.note_override(override, why)
            else:
                self._write(raw, parts, value, f"override {key}")
        return cluster

    def _why_no_place(self, raw: dict[str, Any], parts: list[str]) -> str:
        """Return why there is no such place as the parts of a dotted key say, "" where there is."""
        phases, params = _mapping(raw.get("phases")), _mapping(raw.get("params"))
        if parts[0] not in ("params", "name", "on_code_change") and parts[0] not in phases:
            return f"no phase {parts[0]!r}{nearest(parts[0], ['params', 'cluster', *map(str, phases)])}"
        if parts[0] == "params" and len(parts) > 1 and parts[1] not in params:
            return f"no param {parts[1]!r}{nearest(parts[1], [str(name) for name in params])}"
        return ""

    def _write(self, raw: dict[str, Any], parts: list[str], value: Any, source: str) -> None:
        """Write a value where the parts of a dotted key say, of a phase once all of `params` is written (`load`).

        `source` is what a problem with it will name.
        """
        is_top, key = parts[0] in ("params", "name", "on_code_change"), ".".join(parts)
        self.problems.overridden[key if is_top else f"phases.{key}"] = source
        if is_top:
            self._put("", raw, parts, value, {})
        else:
            self.of_phases.append((parts, value))

    def _put(self, prefix: str, below: dict[str, Any], parts: list[str], value: Any, params: dict[str, Any]) -> None:
        """Write a value below the parts of a dotted key; where these lead into what is no mapping, that is noted.

        Each mapping on the way becomes a copy: it may stand elsewhere too, by an anchor of YAML or as `${params.NAME}`.
        """
        for place, part in enumerate(parts[:-1], 1):
            there = below.get(part)
            if isinstance(there, str) and (param := PARAM.match(there)):
                there = params.get(param[1])
            if not isinstance(there, (dict, type(None))):
                key, whole = ".".join(parts), ".".join(parts[:place])
                self.problems.note(
                    f"{prefix}{key}", f"{whole} is {there!r}, which has no {parts[place]!r}; give all of it"
                )
                return
            below[part] = dict(there or {})
            below = below[part]
        below[parts[-1]] = value

    def _leave_out(self, written: dict[Any, Any], resolver: Resolver) -> None:
        """Find the phases that `when` leaves out; overrides of their values would do nothing, and are noted."""
        for name, body in written.items():
            if not isinstance(body, dict) or "when" not in body:
                continue
            key = f"phases.{name}.when"
            when = resolver.resolve(key, body["when"])
            if not isinstance(when, bool):
                if key not in resolver.unresolved:
                    self.problems.note(key, f"{when!r} is neither true nor false")
            elif not when:
                self.left_out.append(str(name))
        for parts, _ in self.of_phases:
            if parts[0] in self.left_out and parts[1:] != ["when"]:
                self.problems.note(f"phases.{'.'.join(parts)}", f"phase {parts[0]} is left out: its `when` is false")
        if written and len(self.left_out) == len(written):
            self.problems.note("phases", "each is left out: its `when` is false")

    # -- one phase -----------------------------------------------------------------------------------------------

    def _phase(self, name: str, body: Any, resolver: Resolver) -> Phase | None:
        """Return one phase; None, which is noted, of what is none."""
        key = f"phases.{name}"
        if not NAME.match(name) or name in RESERVED_NAMES:
            self.problems.note(
                key, f"{name!r} is not a phase name (lower-case letters, digits, _; not {', '.join(RESERVED_NAMES)})"
            )
            return None
        if not isinstance(body, dict):
            self.problems.note(key, f"{body!r} is not a mapping of {', '.join(PHASE_KEYS)}")
            return None
        self.problems.note_unknown_keys(body, PHASE_KEYS, f"{key}.")
        body = resolver.resolve(key, body)
        for part in body:  # elsewhere nobody puts the folder in the reference's place
            for phase in sorted(references(body[part])) if part != "with" else ():
                self.problems.note(f"{key}.{part}", f"refers to the output of {phase}, which only `with` can")
        kind = self._kind(key, body.get("uses"))
        settings = body.get("with") or {}
        if not isinstance(settings, dict):
            self.problems.note(f"{key}.with", f"{settings!r} is not a mapping")
            settings = {}
        settings = without_blocks(kind.config, settings) if kind else settings
        needs = self._needs(key, body.get("needs") or [], settings, resolver.phases)
        resources = self._resources(f"{key}.resources", body.get("resources") or {}, resolver)
        array = self._array(key, body.get("array"), kind)
        throttle = body.get("throttle") or 0
        if not isinstance(throttle, int) or isinstance(throttle, bool) or throttle < 0:
            self.problems.note(f"{key}.throttle", f"{throttle!r} is not a number of elements that may run at once")
            throttle = 0
        if kind is None:
            return None
        return Phase(
            name=name,
            uses=str(body.get("uses")),
            needs=needs,
            settings=settings,
            config=structured(
                problems=self.problems,
                key=f"{key}.with",
                schema=kind.config,
                settings=settings,
                skipped=resolver.unresolved,
                elsewhere=kind.elsewhere,
            ),
            array=array,
            throttle=throttle,
            resources=resources,
            kind=kind,
        )

    def _resources(self, key: str, resources: Any, resolver: Resolver) -> Request:
        """Return what a phase asks of the cluster; the default role's where that is not to be read."""
        if not isinstance(resources, dict):
            self.problems.note(key, f"{resources!r} is not a mapping")
            resources = {}
        asked = structured(
            problems=self.problems,
            key=key,
            schema=Request,
            settings={"role": DEFAULT_ROLE, **resources},
            skipped=resolver.unresolved,
        )
        return asked or Request(DEFAULT_ROLE)

    def _kind(self, key: str, uses: Any) -> PhaseKind | None:
        """Return the phase kind that `uses` names; None, which is noted, where there is none."""
        if uses is None:
            self.problems.note(f"{key}.uses", f"missing: name a phase kind{nearest('', kind_names())}")
            return None
        try:
            kind = find_kind(str(uses))
        except UserMistake as mistake:
            self.problems.note(f"{key}.uses", str(mistake))
            return None
        if kind is None:
            self.problems.note(f"{key}.uses", f"unknown phase kind {uses!r}{nearest(str(uses), kind_names())}")
        return kind

    def _needs(self, key: str, written: Any, settings: dict[str, Any], names: list[str]) -> list[Need]:
        """Return the needs that are written down, and those that the settings refer to."""
        needs: dict[str, Need] = {}
        for entry in written if isinstance(written, list) else [written]:
            for phase, type_ in entry.items() if isinstance(entry, dict) else [(entry, "afterok")]:
                if phase not in names:
                    self.problems.note(f"{key}.needs", f"no phase {phase!r}{nearest(str(phase), names)}")
                elif phase in self.left_out:
                    self.problems.note(f"{key}.needs", f"phase {phase} is left out: its `when` is false")
                elif type_ not in NEED_TYPES:
                    near = nearest(str(type_), NEED_TYPES)
                    self.problems.note(f"{key}.needs.{phase}", f"unknown dependency type {type_!r}{near}")
                else:
                    needs[phase] = Need(phase, type_)
        for phase in sorted(references(settings)):
            if phase in self.left_out:
                self.problems.note(f"{key}.with", f"refers to phase {phase}, which is left out: its `when` is false")
            elif phase in names:
                needs.setdefault(phase, Need(phase))
        return list(needs.values())

    def _array(self, key: str, array: Any, kind: PhaseKind | None) -> list[Any] | int | None:
        """Return `array`, checked by hand: OmegaConf knows no union of int and list."""
        if array is None:
            return None
        if (
            isinstance(array, bool)
            or not isinstance(array, (int, list))
            or (isinstance(array, int) and array < 1)
            or array == []
        ):
            self.problems.note(
                f"{key}.array", f"{array!r} is neither a number of elements (1 or more) nor a list of values"
            )
            return None
        if (elements := array if isinstance(array, int) else len(array)) > MOST_ELEMENTS:
            self.problems.note(f"{key}.array", f"{elements:,} elements are more than {MOST_ELEMENTS:,}, the most")
            return None
        if kind is not None and not kind.can_split:
            self.problems.note(
                f"{key}.array", f"{array!r}: phase kind {kind.name} cannot be split into elements; remove `array`"
            )
            return None
        return array

    def _order(self, phases: dict[str, Phase]) -> dict[str, Phase]:
        """Return the phases in an order in which each follows its needs; a cycle is noted."""
        ordered: dict[str, Phase] = {}
        waiting = dict(phases)
        while waiting:
            ready = [p for p in waiting.values() if all(n.phase not in waiting for n in p.needs)]
            if not ready:
                self.problems.note("phases", f"cycle: {' -> '.join(_cycle(waiting))}; a phase cannot wait for itself")
                break
            for phase in ready:
                ordered[phase.name] = waiting.pop(phase.name)
        return ordered


def _mapping(value: Any) -> dict[Any, Any]:
    """Return a value that is a mapping, else none that is empty."""
    return value if isinstance(value, dict) else {}


def _cycle(waiting: dict[str, Phase]) -> list[str]:
    """Return one cycle among phases that all wait on each other, as names, the first repeated at the end."""
    name, seen = next(iter(waiting)), list[str]()
    while name not in seen:
        seen.append(name)
        name = next(need.phase for need in waiting[name].needs if need.phase in waiting)
    return [*seen[seen.index(name) :], name]
