"""Writes a model folder as a distributed checkpoint that Megatron-LM loads."""

from typing import Any

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import export_megatron
from megatron_ext.entrypoints.export_megatron import Config
from megatron_ext.preflight import facts
from megatron_ext.preflight.costs import weights


def check(config: Config, placement: Placement) -> list[Problem]:
    return export_megatron.check(config, placement.ranks, placement)


def costs(config: Config, placement: Placement) -> dict[str, float]:
    return weights(facts.model_config(config.model, placement)[0], "")


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = export_megatron.run(config, task.out, task.keep, task.progress)
    return {
        "headline": f"{facts['path']}, {facts['tensors']:,} tensors, {facts['bytes']:,} bytes, {facts['dtype']}",
        **facts,
    }
