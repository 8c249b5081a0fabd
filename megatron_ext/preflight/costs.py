"""What a phase with a model will take of time and of the disk, as far as it is known before it runs."""

from collections.abc import Mapping
from typing import Any

from megatron_ext.lora import settings as loras
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.models.registry import parse_config
from megatron_ext.parallel.plan import DEGREES, ParallelPlan
from megatron_ext.parallel.rules import is_legal
from megatron_ext.parallel.shape import ModelShape
from megatron_ext.preflight.facts import Training
from megatron_ext.preflight.flops import step


def trained_parameters(shape: ModelShape, lora: LoraConfig) -> int:
    """Return how many parameters are trained: all, or those of the adapters."""
    if not lora.rank:
        return shape.parameters.total
    return sum(loras.adapters(lora, shape, kind).total * count for kind, count in shape.blocks.items())


def bytes_of(dtype: str) -> int:
    """Return the bytes of one weight of a type among DTYPES."""
    return 4 if dtype == "float32" else 2


def weights(hf_config: Mapping[str, Any] | None, dtype: str = "", shares: int = 1) -> dict[str, float]:
    """Return what a phase that writes all weights of a model leaves at the least: "bytes" of one of `shares` elements.

    Args:
        hf_config: the model's config.json; {} is returned while it is not known, or not understood.
        dtype: of the weights, "" where each keeps its own, which config.json need not tell: two bytes then.
    """
    family, dims, _ = parse_config(dict(hf_config), "config.json") if hf_config else (None, None, [])
    if family is None or dims is None:
        return {}
    return {"bytes": family.config.shape(dims).parameters.total * bytes_of(dtype) / shares}


def checkpoint_bytes(t: Training) -> int:
    """Return the bytes of one checkpoint at the least: trained weights, and AdamW's moments with the fp32 master.

    The sizes are those of memory.py: 4 + 8 bytes a parameter in float32, else 2 + 12.
    """
    return (12 if t.dtype == "float32" else 14) * trained_parameters(t.known_shape, t.lora)


def costs(plan: ParallelPlan, t: Training, updates: int, checkpoints: int) -> dict[str, float]:
    """Return what is known: "seconds" of all updates by the predicted step, "bytes" of checkpoints and the model that
    is made of the last of them, or of its adapter.

    Args:
        checkpoints: how many lie on the disk at once.
    """
    if t.shape is None:
        return {}
    result = trained_parameters(t.known_shape, t.lora) * bytes_of(t.dtype)
    known: dict[str, float] = {"bytes": checkpoints * checkpoint_bytes(t) + result}
    w = t.workload
    sizes = w.pack_length and w.global_batch and all(getattr(plan, name) >= 1 for name in DEGREES)
    if t.gpu and sizes and is_legal(plan, w):
        known["seconds"] = updates * step(plan, t).seconds
    return known
