"""`afterok explain`: the phase kinds, and each setting of one with type, default, unit, range, example and meaning."""

import dataclasses
import json
import re
import shlex
import textwrap
from dataclasses import dataclass
from typing import Any

from data_tools.base.declared import NAME, Described, describe
from data_tools.base.yaml_loaders import read_typed
from data_tools.mistake import UserMistake, nearest
from jobs.kind import PhaseKind, find_kind, kind_names
from slurm.profile.schema import Request

RESOURCES = "resources"  # what may be explained beside the kinds
_PLAIN = re.compile(r"[\w./~][\w./~:+-]*[\w./~]|\w")  # text that needs no quotes in YAML, between braces neither


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

    def lines(self, width: int) -> list[str]:
        """Return the settings for people, wrapped at `width` columns: of each its key, type, default, unit and range;
        what it means; and an example on one line, to be pasted below `with:` or `resources:`."""
        below = "resources" if self.phase == RESOURCES else "with"
        how = f"Of each setting the last line is an example, to be pasted below `{below}:` of a phase."
        keys = "A setting with * does not change the phase's key, one with + does once it is set."
        lines = _wrapped(f"{self.phase}: {self.about}" if self.about else self.phase, width, indent="")
        lines += _wrapped(how if self.phase == RESOURCES else f"{how} {keys}", width, indent="")
        for each in self.settings:
            mark = "" if self.phase == RESOURCES else {True: "", False: " *", "if_set": " +"}[each.keyed]
            told = [each.type, _default_of(each), each.unit and f"in {each.unit}", each.legal]
            lines += [
                "",
                f"{each.key}{mark}",
                *_wrapped(", ".join(filter(None, told)), width),
                *_wrapped(each.help, width),
            ]
            lines += [] if each.example is None else [f"    {pasted(each.key, each.example)}"]
        return lines

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "settings": [dataclasses.asdict(setting) for setting in self.settings]}


def _wrapped(text: str, width: int, indent: str = "    ") -> list[str]:
    return textwrap.wrap(text, max(width, 40), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _default_of(setting: Described) -> str:
    if setting.needed:
        return "required"
    return "" if setting.type == "mapping" else f"default {spelled(setting.default)}"


def spelled(value: Any) -> str:
    """Return a value as YAML in one line that reads the same in an override, a block and between braces."""
    if isinstance(value, str):
        return (
            value if _PLAIN.fullmatch(value) and read_typed(value) == value else json.dumps(value, ensure_ascii=False)
        )
    if isinstance(value, dict):
        return f"{{{', '.join(f'{spelled(key)}: {spelled(each)}' for key, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(spelled, value))}]"
    return json.dumps(value, default=str)


def pasted(key: str, value: Any) -> str:
    """Return a setting with a value as one line of YAML: `lora: {rank: 8}` for lora.rank."""
    first, *rest = re.findall(r"[^.\[\]]+|\[N\]", key)
    text = spelled(value)
    for part in reversed(rest):
        text = f"[{text}]" if part == "[N]" else f"{{{part}: {text}}}"
    return f"{first}: {text}"


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
    if phase == RESOURCES:
        about, settings = _about_resources(), describe(Request, keyed=False)
    else:
        kind = _kind(phase)
        about, settings = _about(kind), describe(kind.config)
    if setting:
        wanted = [each for each in settings if _is_below(each.key, setting)]
        if not wanted:
            told = _told_elsewhere(phase, setting) or _nearest_key(setting, settings)
            raise UserMistake(f"phase kind {phase} has no setting {setting!r}{told}")
        settings = wanted
    return Explained(phase, about, settings)


def _told_elsewhere(phase: str, setting: str) -> str:
    """Return what a kind has in place of a setting that other kinds have; "" where that is not known."""
    told = "" if phase == RESOURCES else _kind(phase).elsewhere.get(setting.partition(".")[0], "")
    return f": {told}" if told else ""


def _kind(phase: str) -> PhaseKind:
    kind = find_kind(phase)
    if kind is None:
        own = "; of a phase of a pipeline, name the kind that it uses"
        raise UserMistake(f"unknown phase kind {phase!r}{nearest(phase, [*kind_names(), RESOURCES])}{own}")
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
