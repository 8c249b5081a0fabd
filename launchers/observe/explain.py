"""`afterok explain`: the phase kinds, and each setting of one with type, default, unit, range, example and meaning."""

import dataclasses
import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from data_tools.base.declared import NAME, Described, describe
from data_tools.base.yaml_loaders import read_typed
from data_tools.mistake import UserMistake, nearest
from jobs.kind import PhaseKind, find_kind, kind_names
from slurm.profile.schema import Request

RESOURCES = "resources"  # what may be explained beside the kinds


@dataclass(frozen=True)
class Explained:
    """A phase kind and its settings, or those of them that were asked for."""

    phase: str
    about: str
    settings: list[Described]

    @property
    def how(self) -> str:
        """Return how a setting is written, by the first one that has an example."""
        below = "resources" if self.phase == RESOURCES else "with"
        shown = next((each for each in self.settings if each.example is not None), None)
        if shown is None:
            return ""
        return f"written as {shlex.quote(f'PHASE.{below}.{shown.key}={spelled(shown.example)}')}"

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "settings": [dataclasses.asdict(setting) for setting in self.settings]}


def spelled(value: Any) -> str:
    """Return a value as YAML in one line, as an override has it."""
    if isinstance(value, str) and read_typed(value) == value:
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).split("\n")[0]


def kinds() -> list[tuple[str, str]]:
    """Return what can be explained, with one line about it: our phase kinds, and what each may ask of the cluster."""
    return [*((name, _about(_kind(name))) for name in kind_names()), (RESOURCES, _about_resources())]


def explain(phase: str, setting: str = "") -> Explained:
    """Return the settings of a phase kind, or one setting and those below it; KIND.SETTING says the same in one word.

    Raise UserMistake where there is no such kind or setting.
    """
    first, _, rest = phase.partition(".")
    if rest and first in (*kind_names(), RESOURCES):
        phase, setting = first, setting or rest
    kind = _kind(phase) if phase != RESOURCES else None
    about = _about(kind) if kind is not None else _about_resources()
    schema: type = kind.config if kind is not None else Request
    settings = describe(schema, keyed=phase != RESOURCES)
    if setting:
        wanted = [each for each in settings if _is_below(each.key, setting)]
        if not wanted:
            raise UserMistake(f"phase kind {phase} has no setting {setting!r}{_nearest_key(setting, settings)}")
        settings = wanted
    return Explained(phase, about, settings)


def _kind(phase: str) -> PhaseKind:
    kind = find_kind(phase)
    if kind is None:
        raise UserMistake(f"unknown phase kind {phase!r}{nearest(phase, [*kind_names(), RESOURCES])}")
    return kind


def _about(kind: PhaseKind) -> str:
    return (kind.module.__doc__ or "").strip().partition("\n")[0]


def _about_resources() -> str:
    return "What any phase may ask of the cluster; what it does not say is the role's, in the profile."


def _is_below(key: str, asked: str) -> bool:
    """Return whether `key` is the setting asked for or below it; any name stands for a NAME in the key."""
    pattern = re.escape(key).replace(rf"\.{NAME}", r"\.[^.]+")
    return key == asked or key.startswith(f"{asked}.") or re.fullmatch(pattern, asked) is not None


def _nearest_key(asked: str, settings: list[Described]) -> str:
    """Return which setting may be meant, and those of the mapping that the setting asked for would stand in."""
    above = asked.rpartition(".")[0]
    keys = [each.key for each in settings]
    beside = [key for key in keys if key.rpartition(".")[0] == above]
    return nearest(asked, beside or [key for key in keys if "." not in key])
