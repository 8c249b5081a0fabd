"""Merges the adapter of a model folder into its weights: a plain model folder that computes the same.

As an array, each element merges a share of the tensors."""

from pathlib import Path
from typing import Any

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import merge_lora
from megatron_ext.entrypoints.merge_lora import Config
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.preflight import facts
from megatron_ext.preflight.costs import weights


def check(config: Config, placement: Placement) -> list[Problem]:
    return merge_lora.check(config, placement.ranks, placement)


def forecast(config: Config, placement: Placement) -> dict[str, Any]:
    return facts.forecast(config.model, LoraConfig(), placement)


def costs(config: Config, placement: Placement) -> dict[str, float]:
    return weights(facts.model_config(config.model, placement)[0], shares=placement.elements)


def run(config: Config, task: Task) -> dict[str, Any]:
    tensors = merge_lora.share(config, task.out, task.progress, index=task.index, count=task.count)
    return {"headline": f"{tensors:,} tensors", "tensors": tensors}


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    facts = merge_lora.finish(config, parts, task.out)
    lora = facts["lora"]
    return {"headline": f"LoRA of rank {lora['rank']} on {', '.join(lora['targets'])} merged", **facts}
