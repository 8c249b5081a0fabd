"""Tiny models with LoRA on them, the same in any process and under any layout."""

import hashlib
from typing import Any

import torch

from megatron_ext.lora import adapters
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.models.layouts import shard_on_rank
from megatron_ext.models.registry import stages
from tests.megatron_ext import cells, tiny

EVERYTHING = {  # the targets of each family that PEFT takes, beside router and experts
    "qwen2": ["all-linear"],
    "gpt_oss": ["all-linear"],
    "nemotron_h": ["all-linear"],
    "nanochat": ["q_proj", "v_proj", "o_proj", "fc1", "fc2"],  # of a fused matrix, a part stays as it is
}
FAMILIES: dict[str, Any] = {name: cells.FAMILIES[name] for name in (*EVERYTHING, *tiny.KINDS)}


def lora(of: Any, rank: int = 3, alpha: float = 6.0, **changes: Any) -> LoraConfig:
    of_experts = ["experts", "router"] if getattr(of, "experts", 0) else []
    return LoraConfig(rank, alpha, **{"targets": [*EVERYTHING[tiny.family(of).name], *of_experts], **changes})


@torch.no_grad()
def attach(model: Any, of: Any, config: LoraConfig, seed: int = 0) -> Any:
    """`model` with adapters whose B is not zero, as after training."""
    adapters.attach(model, tiny.family(of), of, config, seed)
    for part in stages(model):
        for adapter in part.adapters.children():
            rule = adapter.pair.b
            generator = torch.Generator().manual_seed(int(hashlib.sha256(rule.name.encode()).hexdigest()[:8], 16))
            parts = [torch.randn(shape, generator=generator) for shape in rule.layout.hf_shapes()]
            parts = [0.1 * part * adapted for part, adapted in zip(parts, adapter.pair.parts, strict=True)]
            adapter.B.copy_(shard_on_rank(rule, rule.layout.join(parts), part))
    return model
