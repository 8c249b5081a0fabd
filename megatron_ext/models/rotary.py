"""How rotary positions are stretched beyond those of pretraining: what config.json says of it, both ways. No torch.

`default` positions are as they are, and llama3's have a field of their own (qwen2/config.py). `longrope` is refused:
its frequencies change with the length of a document, which neither packs nor caches of a rollout know.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_ext.models.config_reading import Reading


@dataclass(frozen=True)
class Yarn:
    """Rotary positions stretched by `factor` (Peng et al., arXiv 2309.00071)."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool  # the correction range to whole numbers


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (Chen et al., arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Dynamic:
    """Positions stretched beyond max_position_embeddings only, where no document of ours reaches: the default's."""

    factor: float


Stretch = Yarn | Linear | Dynamic
YARN = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"}
KEYS: Mapping[str, Collection[str]] = {  # rope_type -> the keys that it may have
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": YARN | {"attention_factor"},
}


def stretch_of(reading: Reading, rope: Mapping[str, Any]) -> Stretch | None:
    """Return how the positions of `Reading.rope` are stretched, None where they are not."""
    kind = rope["rope_type"]
    if kind not in ("linear", "dynamic", "yarn"):
        return None
    if kind != "yarn":
        if "factor" not in rope:
            reading.refuse("rope_parameters", dict(rope), f"{kind} needs factor")
        factor = float(reading.number("factor", 1.0, rope))
        return Linear(factor) if kind == "linear" else Dynamic(factor)
    original = rope.get("original_max_position_embeddings")
    if "factor" not in rope or original is None:
        reading.refuse("rope_parameters", dict(rope), "yarn needs factor and original_max_position_embeddings")
    if not isinstance(rope.get("truncate", True), bool):
        reading.refuse("rope_parameters.truncate", rope["truncate"], "use true or false")
    yarn = Yarn(
        factor=float(reading.number("factor", 1.0, rope)),
        original_positions=int(reading.number("original_max_position_embeddings", 4096, rope)),
        beta_fast=float(reading.number("beta_fast", 32, rope)),
        beta_slow=float(reading.number("beta_slow", 1, rope)),
        truncate=bool(rope.get("truncate", True)),
    )
    given, own = reading.number("attention_factor", length_factor(yarn), rope), length_factor(yarn)
    if abs(given - own) > 1e-6 * own:
        reading.refuse("rope_parameters.attention_factor", given, f"{own} is, which follows from the factor")
    return yarn


def length_factor(yarn: Yarn) -> float:
    """Return by how much queries and keys grow: 0.1 ln(factor) + 1 (mcore's yarn_rotary_pos_embedding.py)."""
    return 0.1 * math.log(max(yarn.factor, 1.0)) + 1.0


def settings_of(stretch: Stretch | None, base: float) -> dict[str, Any]:
    """Return rope_parameters of config.json."""
    if stretch is None:
        return {"rope_type": "default", "rope_theta": base}
    names = {"original_positions": "original_max_position_embeddings"}
    values = {names.get(field.name, field.name): getattr(stretch, field.name) for field in fields(stretch)}
    return {"rope_type": type(stretch).__name__.lower(), "rope_theta": base, **values}
