"""Asks an exported folder by transformers, or its GGUF by llama.cpp, prompts of tasks, beside the base model."""

from typing import Any

from data_tools.evaluations.accuracy import headline
from data_tools.mistake import Problem
from data_tools.tasks import mix
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import run_exported
from megatron_ext.entrypoints.run_exported import Config


def check(config: Config, placement: Placement) -> list[Problem]:
    return run_exported.check(config, placement.ranks, placement)


def datasets(config: Config) -> list[str]:
    return mix.datasets(config.mix)


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = run_exported.run(config, task.out, task.keep, task.progress)
    kind = f" ({facts['quantized']})" if facts["quantized"] else ""
    by = facts["llama_cpp"] if config.gguf else f"transformers in {facts['dtype']}{kind}"
    return {"headline": f"{headline(facts)}; by {by}", **facts}
