"""Settings as a dataclass types them: every unknown key, wrong type and missing value is a problem of its own."""

import dataclasses
import functools
import json
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf, ValidationError
from omegaconf.errors import OmegaConfBaseException

from jobs.kind import PhaseKind
from jobs.schema.problems import Problems
from jobs.schema.references import first_line


def without_blocks(schema: type, settings: Any) -> Any:
    """Return settings without the blocks, mappings and lists that are null: each is as if nobody had written it.

    So `engine: null` takes away what an anchor or the pipeline file says, and leaves the defaults. A setting that may
    be null itself keeps it.
    """
    if not dataclasses.is_dataclass(schema) or not isinstance(settings, dict):
        return settings
    kinds = get_type_hints(schema)
    blocks = {field.name for field in dataclasses.fields(schema) if field.default_factory is not dataclasses.MISSING}
    return {
        name: _without_inner_blocks(kinds.get(name), value)
        for name, value in settings.items()
        if value is not None or name not in blocks or type(None) in get_args(kinds[name])
    }


def _without_inner_blocks(kind: Any, value: Any) -> Any:
    """Return a setting's value without such blocks in it: those of a block, or of each one of a list or a mapping."""
    inner = get_args(kind)[-1:]
    if inner and isinstance(value, list) and get_origin(kind) is list:
        return [without_blocks(inner[0], each) for each in value]
    if inner and isinstance(value, dict) and get_origin(kind) is dict:
        return {name: without_blocks(inner[0], each) for name, each in value.items()}
    return without_blocks(kind, value)


def typed_config(kind: PhaseKind, settings: dict[str, Any]) -> Any:
    """Return an instance of the phase's own Config dataclass, from settings that were checked before."""
    return OmegaConf.to_object(OmegaConf.merge(_defaults(kind.config), settings))


def structured(
    problems: Problems,
    key: str,
    schema: type,
    settings: Any,
    skipped: Collection[str] = (),
    elsewhere: Mapping[str, str] = {},
) -> Any:
    """Return `settings`, the value of a dotted key, as the dataclass `schema`; None, which is noted, where one lacks.

    What is wrong is noted key by key, so that one mistake does not hide the others; not of `skipped` keys.
    `elsewhere` says of keys that other schemas have what this one has in their place.
    """
    if not isinstance(settings, dict):
        problems.note(key, f"{settings!r} is not a mapping")
        return None
    if others := {name: elsewhere[name] for name in settings if name in elsewhere}:
        for name, told in others.items():
            problems.note(f"{key}.{name}", f"unknown key: {told}")
        settings = {name: value for name, value in settings.items() if name not in others}
    try:
        config = _merged(schema, settings)
    except OmegaConfBaseException:
        good = _good_keys(problems=problems, key=key, schema=schema, settings=settings, skipped=skipped)
        config = _merged(schema, good)
    missing = sorted(OmegaConf.missing_keys(config))
    for name in missing:
        if name not in settings:
            problems.note(f"{key}.{name}", "missing: this value has no default")
    return None if missing else OmegaConf.to_object(config)


def _good_keys(
    problems: Problems, key: str, schema: type, settings: dict[str, Any], skipped: Collection[str]
) -> dict[str, Any]:
    """Return the settings that the dataclass `schema` takes; the others are noted."""
    fields = {entry.name: entry for entry in dataclasses.fields(schema)}
    problems.note_unknown_keys(settings, tuple(fields), f"{key}.")
    good = {}
    for name, value in settings.items():
        if name not in fields or f"{key}.{name}" in skipped:
            continue
        type_ = fields[name].type
        if _holds_settings(type_, value):
            good[name] = _good_parts(problems=problems, key=f"{key}.{name}", kind=type_, value=value, skipped=skipped)
            continue
        try:
            _merged(schema, {name: value})
            good[name] = value
        except OmegaConfBaseException as error:
            expected = type_.__name__ if isinstance(type_, type) else str(type_).replace("typing.", "")
            spelled, why = ("null", _in_place(fields[name])) if value is None else (repr(value), first_line(error))
            problems.note(f"{key}.{name}", f"{spelled} is not of type {expected} ({why})")
    return good


def _in_place(field: "dataclasses.Field[Any]") -> str:
    """Return what to write in place of null."""
    if field.default in (dataclasses.MISSING, "???"):
        return "write a value"
    return f"write a value; the default is {json.dumps(field.default, default=str)}"


def _holds_settings(kind: Any, value: Any) -> bool:
    """Return whether a value is the mapping of a dataclass, or a mapping or list of such."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    inner = get_args(kind)[-1:]
    if not (inner and isinstance(inner[0], type) and dataclasses.is_dataclass(inner[0])):
        return False
    if not isinstance(value, get_origin(kind)):
        return False
    return all(isinstance(element, dict) for element in (value.values() if isinstance(value, dict) else value))


def _good_parts(problems: Problems, key: str, kind: Any, value: Any, skipped: Collection[str]) -> Any:
    """Return a value that holds settings, without those that its dataclasses do not take, which are noted."""
    if not get_args(kind):
        return _good_keys(problems=problems, key=key, schema=kind, settings=value, skipped=skipped)
    schema = get_args(kind)[-1]
    places = (
        {name: f"{key}.{name}" for name in value}
        if isinstance(value, dict)
        else {place: f"{key}[{place}]" for place in range(len(value))}
    )
    good = {
        name: _good_keys(problems=problems, key=place, schema=schema, settings=value[name], skipped=skipped)
        for name, place in places.items()
    }
    return good if isinstance(value, dict) else list(good.values())


def _merged(schema: type, settings: dict[str, Any]) -> Any:
    """Return the dataclass's defaults with settings over them. Raise OmegaConfBaseException for what is of another
    type."""
    _refuse_misplaced(schema, settings)
    return OmegaConf.merge(_defaults(schema), settings)


def _refuse_misplaced(wanted: Any, value: Any) -> None:
    """Raise ValidationError for a list or mapping in the place of another, or of a text or number in one of these, and
    for a truth value or a number with a fraction in the place of a text.

    OmegaConf takes the former as they are, has a TypeError for lists, and makes texts of the latter that nobody wrote:
    "False" of off, "3.1" of 3.10.
    """
    if dataclasses.is_dataclass(wanted):
        for name, inner in get_type_hints(wanted).items():
            if isinstance(value, dict) and name in value:
                _refuse_misplaced(inner, value[name])
        return
    kind = getattr(wanted, "__origin__", wanted)
    if kind in (list, dict) and isinstance(value, (list, dict)) and not isinstance(value, kind):
        raise ValidationError(f"a {type(value).__name__} in place of a {kind.__name__}")
    if kind in (str, int, float, bool) and isinstance(value, (list, dict)):
        raise ValidationError(f"{value!r} in place of a {kind.__name__}")
    is_text = kind is str or {*get_args(wanted)} == {str, type(None)}
    if is_text and isinstance(value, (bool, float)):
        raise ValidationError("YAML reads it as no text: put what you mean in quotes")
    for inner in get_args(wanted)[-1:] if kind in (list, dict) else ():
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            _refuse_misplaced(inner, item)


@functools.cache
def _defaults(schema: type) -> DictConfig:
    """Return a dataclass's defaults, to be merged with other settings, which leaves them as they are."""
    return OmegaConf.structured(schema)
