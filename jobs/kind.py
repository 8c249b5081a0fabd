"""A phase kind: what one file of jobs/phases (or a user's module) exports, found by name.

Config                         dataclass, typed by OmegaConf. A field made by data_tools.base.declared.setting has help,
                               unit and range: a value out of it is refused for every kind, and `afterok explain`
                               prints them. Metadata say what keys and plan need:
                               {"input": True}   a file or folder that must exist; enters the key by content
                               {"input": "hub"}  a folder, or a hub name org/name, which enters as text
                               {"input": FILE_OR_NAME}  a file, or a name of ours, of which `meaning` tells the key
                               {"module": True}  may name a module of the user's: it goes into the snapshot, and
                                                 with what it imports of the user's files into the key, by content
                               {"keyed": False}  does not change the result; not part of the key
                               {"keyed": "if_set"}  part of it unless empty: the phase was sealed without it before
                               its static method `meaning(config) -> dict`, if any, adds to the key where the same
                               settings give another result than they did
run(config, task) -> facts     the work of one element on one rank; fills task.out
finish(parts, config, task)    merges the element folders `parts` into task.out; its presence allows `array`
OF_ELEMENTS = ("engine",)      facts of elements that the phase's own seal tells too; where elements differ, a list
STOPS = True                   `run` asks task.stop and goes on later from what it left in task.keep
check(config, placement) -> [Problem]   what else can be refused before anything queues, of several settings or of
                               files: a value out of its range was refused, and is the default here
datasets(config) -> [spec]     the datasets of the hub that it reads from the local cache (records/hub.py); plan
                               says which are not there
forecast(config, placement) -> facts    what its folder will hold, for the checks of the phases that read it
costs(config, placement) -> facts       what is known of "seconds" of one element, and of the "bytes" that it leaves,
                               at the least: checkpoints, weights (megatron_ext/preflight/costs.py)
secrets(config) -> {variable: reference}   secrets that `run` reads from its environment, and where they lie
                               (jobs/secrets.py); a profile's of the same name goes before it
remarks(config, placement) -> [text]    what `plan` and `submit` say of the phase, such as what a recipe came to
parallel_report(config, placement, searching) -> {"facts", "tables", "notes"}   for `plan --parallel`
"""

import dataclasses
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jobs.phases
from data_tools.base import declared, users_code
from data_tools.mistake import Problem, UserMistake
from data_tools.records import hub
from jobs.schema.imports import beside
from jobs.schema.references import references
from megatron_ext.parallel.plan import Site


@dataclass(frozen=True)
class Placement(Site):
    """Where a phase would run, as far as its `check` needs to know: sizes, not names of partitions."""

    elements: int = 1
    values: tuple[Any, ...] = ()  # of an array that lists them
    # Of the phases that it follows element by element (aftercorr): folder -> how many elements that phase has.
    partners: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class PhaseKind:
    """A phase kind by its name and module; what the module leaves out has a default here."""

    name: str
    module: ModuleType

    @property
    def config(self) -> type:
        """The dataclass of its settings."""
        return self.module.Config

    @property
    def can_split(self) -> bool:
        """Whether it may have an `array`: its elements can be merged."""
        return hasattr(self.module, "finish")

    @property
    def can_stop(self) -> bool:
        """Whether it stops when it is asked to, and goes on later."""
        return getattr(self.module, "STOPS", False)

    @property
    def of_elements(self) -> tuple[str, ...]:
        """Facts of its elements that the phase's seal repeats."""
        return getattr(self.module, "OF_ELEMENTS", ())

    @property
    def takes_parts(self) -> bool:
        """Whether an element may be given its partner's part of a phase (aftercorr). Kinds of ours that do not say so
        take a share of it again; of a user's own nobody knows what it does.
        """
        return "." in self.name or getattr(self.module, "TAKES_PARTS", False)

    @property
    def elsewhere(self) -> dict[str, str]:
        """Keys that settings of other kinds have, and what this kind has in their place, in words."""
        return getattr(self.module, "ELSEWHERE", {})

    @property
    def run(self) -> Callable[..., dict[str, Any] | None]:
        """The work of one element on one rank."""
        return self.module.run

    @property
    def finish(self) -> Callable[..., dict[str, Any] | None]:
        """The merging of all elements."""
        return self.module.finish

    def check(self, config: Any, placement: Placement) -> list[Problem]:
        """Return what is wrong with a config: settings out of their range, and what the module's check finds."""
        own = getattr(self.module, "check", None)
        return declared.check_with(config, lambda legal: own(legal, placement) if own else [])

    def datasets(self, config: Any) -> list[str]:
        """Return what a config reads of the hub from the local cache: datasets, and the models and tokenizers that its
        inputs name (data_tools/records/hub.py has the forms)."""
        datasets, config = getattr(self.module, "datasets", None), declared.legal(config)
        models = [
            hub.MODEL + "@".join(filter(None, (entry, getattr(config, "revision", ""))))
            for _, entry, kind in inputs(self.config, config)
            if kind == "hub" and hub.is_hub_name(entry) and not Path(entry).exists()
        ]
        return [*(datasets(config) if datasets else []), *models]

    def forecast(self, config: Any, placement: Placement) -> dict[str, Any]:
        """Return what the phase's folder will hold, as far as it is known before it runs."""
        forecast = getattr(self.module, "forecast", None)
        return forecast(declared.legal(config), placement) if forecast else {}

    def costs(self, config: Any, placement: Placement) -> dict[str, float]:
        """Return what is known of "seconds" of one element, and of the "bytes" that it leaves, before it runs."""
        costs = getattr(self.module, "costs", None)
        return costs(declared.legal(config), placement) if costs else {}

    def remarks(self, config: Any, placement: Placement) -> list[str]:
        """Return what is to be known of the phase before it runs, a line each."""
        remarks = getattr(self.module, "remarks", None)
        return remarks(declared.legal(config), placement) if remarks else []

    def secrets(self, config: Any) -> dict[str, str]:
        """Return {variable: reference} of the secrets that a config names."""
        secrets = getattr(self.module, "secrets", None)
        return secrets(declared.legal(config)) if secrets else {}

    def parallel_report(self, config: Any, placement: Placement, searching: bool) -> dict[str, Any] | None:
        """Return what the parallel plan costs; None where the phase has none."""
        report = getattr(self.module, "parallel_report", None)
        return report(declared.legal(config), placement, searching) if report else None


def kind_names() -> list[str]:
    """Return the names of our own phase kinds."""
    return sorted(module.name for module in pkgutil.iter_modules(jobs.phases.__path__))


def find_kind(uses: str) -> PhaseKind | None:
    """Return the kind of that name, None when there is none. A dotted name is a module of the user's.

    Raise UserMistake where that module cannot be imported, or is no phase.
    """
    if uses in kind_names():
        return PhaseKind(uses, importlib.import_module(f"jobs.phases.{uses}"))
    if "." not in uses or not all(uses.split(".")):
        return None
    module = users_code.load(uses)
    if not hasattr(module, "Config") or not hasattr(module, "run"):
        raise UserMistake(f"module {uses!r} exports no Config and run (see jobs/kind.py)")
    return PhaseKind(uses, module)


def keyed_settings(schema: type, config: Any) -> dict[str, Any]:
    """Return the part of a config that changes the result, as plain data, nested dataclasses too."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        value = getattr(config, field.name)
        keyed = field.metadata.get("keyed", True)
        if not keyed or keyed == "if_set" and not value:
            continue
        out[field.name] = _keyed(value)
    return out | (schema.meaning(config) if hasattr(schema, "meaning") else {})


def _keyed(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return keyed_settings(type(value), value)
    return {name: _keyed(entry) for name, entry in value.items()} if isinstance(value, dict) else value


def inputs(schema: type, config: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted config key, path or name, metadata value) of every input that a config names."""
    for key, entry, field in _inputs(schema, config, prefix):
        kind = field.metadata["input"]
        if kind != declared.FILE_OR_NAME or declared.names_a_file(entry):
            yield key, entry, kind


def wrong_makers(kind: "PhaseKind", config: Any, uses: Mapping[str, str]) -> Iterator[Problem]:
    """Yield a problem for each input that refers to a phase of a kind of ours which makes no such thing; `uses` are
    the kinds of all phases by their names."""
    for key, entry, field in _inputs(kind.config, config):
        makers = known.made_by if (known := declared.declaration_of(field)) else ()
        for phase in sorted(references(entry)) if makers else ():
            if "." not in uses[phase] and uses[phase] not in makers:
                told = f"phase {phase} uses {uses[phase]}, which makes no such thing; {' or '.join(makers)} does"
                yield Problem(key, told)


def shares_of_parts(kind: "PhaseKind", config: Any, paired: Collection[str]) -> Iterator[Problem]:
    """Yield a problem for each input that is one element's part of a phase in `paired` (aftercorr), of which a kind of
    ours would take a share, as of the whole: most of it would be left out."""
    for key, entry, _ in () if kind.takes_parts else _inputs(kind.config, config):
        for phase in sorted(references(entry) & set(paired)):
            told = f"aftercorr gives each element its partner's part of {phase} alone, which {kind.name} would take for"
            yield Problem(key, f"{told} all of it; say afterok: then its elements share all that {phase} made")


def _inputs(schema: type, config: Any, prefix: str = "") -> "Iterator[tuple[str, str, dataclasses.Field[Any]]]":
    """Yield (dotted config key, what it says, its field) of every setting that is an input and says something."""
    for field in dataclasses.fields(schema):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _inputs(type(value), value, f"{key}.")
        elif isinstance(value, dict):
            for name, entry in value.items():
                if dataclasses.is_dataclass(entry) and not isinstance(entry, type):
                    yield from _inputs(type(entry), entry, f"{key}.{name}.")
        elif field.metadata.get("input") and value:
            yield from ((key, entry, field) for entry in (value if isinstance(value, list) else [value]))


def user_code(uses: str, config: Any) -> list[Path]:
    """Return what the snapshot carries of a user's: the phase kind, tasks that the config names, what these import."""
    roots = [root for name in (uses, *_modules(config)) if (root := user_module_root(name))]
    return [*roots, *(place for root in roots for place in beside(root))]


def user_modules(config: Any) -> list[str]:
    """Return the modules of the user's that a config names, in fields with "module": tasks and rewards."""
    return [name for name in _modules(config) if user_module_root(name)]


def _modules(config: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("module"):
            yield value
        for nested in value.values() if isinstance(value, dict) else [value]:
            if dataclasses.is_dataclass(nested):
                yield from _modules(nested)


def user_module_root(uses: str) -> Path | None:
    """Return the file or top package folder of a user's `my.module` or `my.module:function`; None for ours."""
    if "." not in uses and ":" not in uses:
        return None
    spec = importlib.util.find_spec(re.split("[.:]", uses)[0])
    if spec is None or spec.origin is None:
        return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin
