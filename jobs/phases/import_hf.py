"""Turns a Hugging Face checkpoint into a model folder: megatron-core's format, which any parallel layout reads.

As an array, each element converts a share of the tensors."""

from pathlib import Path
from typing import Any

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import import_hf
from megatron_ext.entrypoints.import_hf import Config
from megatron_ext.preflight.costs import weights


def check(config: Config, placement: Placement) -> list[Problem]:
    return import_hf.check(config, placement.ranks)


def forecast(config: Config, placement: Placement) -> dict[str, Any]:
    return import_hf.forecast(config, placement.forecasts)


def costs(config: Config, placement: Placement) -> dict[str, float]:
    return weights(forecast(config, placement).get("hf_config"), config.dtype, shares=placement.elements)


def run(config: Config, task: Task) -> dict[str, Any]:
    tensors = import_hf.share(config, task.out, task.progress, index=task.index, count=task.count)
    return {"headline": f"{tensors:,} tensors", "tensors": tensors}


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    facts = import_hf.finish(config, parts, task.out)
    changes = "".join(f", {count:,} tensors {change}" for change, count in facts["dtype_changes"].items())
    return {"headline": f"{facts['family']}, {facts['parameters']:,} parameters in {facts['dtype']}{changes}", **facts}
