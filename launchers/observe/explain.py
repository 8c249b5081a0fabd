"""`afterok explain`: the phase kinds, and each setting of one with its type, default, unit, range and meaning."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from data_tools.base.declared import NAME, Described, describe
from data_tools.mistake import UserMistake, nearest
from jobs.kind import PhaseKind, find_kind, kind_names


@dataclass(frozen=True)
class Explained:
    """A phase kind and its settings, or those of them that were asked for."""

    phase: str
    about: str
    settings: list[Described]

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "settings": [dataclasses.asdict(setting) for setting in self.settings]}


def kinds() -> list[tuple[str, str]]:
    """Return each of our phase kinds with one line about it."""
    return [(name, _about(_kind(name))) for name in kind_names()]


def explain(phase: str, setting: str = "") -> Explained:
    """Return the settings of a phase kind, or one setting and those below it.

    Raise UserMistake where there is no such kind or setting.
    """
    kind = _kind(phase)
    settings = describe(kind.config)
    if setting:
        wanted = [each for each in settings if _is_below(each.key, setting)]
        if not wanted:
            raise UserMistake(f"phase kind {phase} has no setting {setting!r}{_nearest_key(setting, settings)}")
        settings = wanted
    return Explained(phase, _about(kind), settings)


def _kind(phase: str) -> PhaseKind:
    kind = find_kind(phase)
    if kind is None:
        raise UserMistake(f"unknown phase kind {phase!r}{nearest(phase, kind_names())}")
    return kind


def _about(kind: PhaseKind) -> str:
    return (kind.module.__doc__ or "").strip().partition("\n")[0]


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
