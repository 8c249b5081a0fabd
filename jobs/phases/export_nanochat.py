"""Turns a model folder of the family nanochat back into nanochat's own checkpoint."""

from typing import Any

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import export_nanochat
from megatron_ext.entrypoints.export_nanochat import Config
from megatron_ext.preflight import facts
from megatron_ext.preflight.costs import weights


def check(config: Config, placement: Placement) -> list[Problem]:
    return export_nanochat.check(config, placement.ranks, placement)


def costs(config: Config, placement: Placement) -> dict[str, float]:
    return weights(facts.model_config(config.model, placement)[0], config.dtype)


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = export_nanochat.run(config, task.out, task.keep, task.progress)
    tokenizer = "" if facts["tokenizer"] else ", without tokenizer.pkl (the model was imported without one)"
    return {"headline": f"{facts['path']}, {facts['bytes']:,} bytes, {facts['dtype']}{tokenizer}", **facts}
