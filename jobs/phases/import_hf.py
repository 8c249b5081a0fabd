"""A Hugging Face checkpoint into a model folder: megatron-core's distributed format, any layout reads it.

As an array, each element converts a share of the tensors."""

from pathlib import Path
from typing import Any

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import import_hf
from megatron_ext.entrypoints.import_hf import Config


def check(config: Config, placement: Placement) -> list[Problem]:
    return import_hf.check(config, placement.ranks)


def forecast(config: Config, placement: Placement) -> dict[str, Any]:
    return import_hf.forecast(config, placement.forecasts)


def run(config: Config, task: Task) -> dict[str, Any]:
    return _told(import_hf.run(config, task.out, task.keep, task.progress, task.index, task.count))


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    return _told(import_hf.finish(config, parts, task.out, task.keep))


def _told(facts: dict[str, Any]) -> dict[str, Any]:
    if "tensors" in facts:
        return {"headline": f"{facts['tensors']:,} tensors", **facts}
    changes = "".join(f", {count:,} tensors {change}" for change, count in facts["dtype_changes"].items())
    return {"headline": f"{facts['family']}, {facts['parameters']:,} parameters in {facts['dtype']}{changes}", **facts}
