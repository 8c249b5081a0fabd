"""Turns a model folder back into a Hugging Face checkpoint that transformers loads.

As an array, each element writes a share of the files."""

from pathlib import Path
from typing import Any

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import export_hf
from megatron_ext.entrypoints.export_hf import Config
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.preflight import facts
from megatron_ext.preflight.costs import weights


def check(config: Config, placement: Placement) -> list[Problem]:
    return export_hf.check(config, placement.ranks, placement)


def costs(config: Config, placement: Placement) -> dict[str, float]:
    if config.adapter == "peft" or config.quantization:  # less, and how much is not known
        return {}
    return weights(facts.model_config(config.model, placement)[0], config.dtype, shares=placement.elements)


def forecast(config: Config, placement: Placement) -> dict[str, Any]:
    merged = config.adapter != "peft"  # whose folder has no config.json
    return facts.forecast(config.model, LoraConfig(), placement) if merged else {}


def run(config: Config, task: Task) -> dict[str, Any]:
    files = export_hf.share(config, task.out, task.progress, index=task.index, count=task.count)
    return {"headline": f"{files:,} files", "files": files}


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    made = export_hf.finish(config, parts, task.out)
    changes = "".join(f", {count:,} tensors {change}" for change, count in made["dtype_changes"].items())
    size = sum(made["bytes"].values())
    if told := made.get("quantized"):
        changes += f", {told['matrices']:,} matrices of experts as MXFP4, {told['exact']:,} of them exactly, relative "
        changes += f"error {told['relative_error']:.2g}"
    return {
        "headline": f"{len(made['bytes'])} safetensors file(s), {size:,} bytes, {made['dtype']}{changes}",
        **made,
    }
