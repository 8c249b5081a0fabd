"""Tell whether two config.json mean the same function, key by key. No torch.

What a family reads it can write again (`hf_config`): `lost` holds the file that was read against the one that would be
written, `differences` two models that are understood. Every difference is named with both values.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ext.models.config_reading import WITHOUT_EFFECT

# A limit, a way to store weights, and older spellings of what rope_parameters says.
NO_FUNCTION = {"max_position_embeddings", "quantization_config", "rope_scaling", "rope_theta"}


def meaning(family: Any, dims: Any) -> dict[str, Any]:
    """Return what decides the function of a model, by the names of config.json, ready for JSON.

    Nested settings have names such as "rope_parameters.factor".
    """
    ignored = WITHOUT_EFFECT | family.config.WITHOUT_EFFECT | NO_FUNCTION
    return dict(_flat({key: value for key, value in family.config.hf_config(dims).items() if key not in ignored}))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return how two meanings differ: "rope_parameters.rope_theta is 10000.0, not 1000000.0"."""
    return [
        f"{key} is {ours.get(key)!r}, not {theirs.get(key)!r}"
        for key in {**ours, **theirs}
        if ours.get(key) != theirs.get(key)
    ]


def lost(file: Mapping[str, Any], family: Any, dims: Any) -> list[str]:
    """Return what a config.json says and `dims`, which were read from it, do not."""
    written = dict(_flat(family.config.hf_config(dims)))
    ignored = WITHOUT_EFFECT | family.config.WITHOUT_EFFECT
    return [
        f"{key} = {value!r} was understood as {written[key]!r}"
        for key, value in _flat({key: value for key, value in file.items() if key not in ignored})
        if value is not None and key in written and value != written[key]
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
