"""Makes a folder to hand on: weights, adapter, GGUF files, files for Ollama and vLLM, a card with the lineage."""

from typing import Any, cast

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import package
from megatron_ext.entrypoints.package import Config
from megatron_ext.serving.card import Step


def check(config: Config, placement: Placement) -> list[Problem]:
    return package.check(config, placement.ranks, placement)


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = package.run(config, task.out, task.keep, task.progress, lineage=cast(list[Step], task.lineage()))
    pushed = f", on the Hub as {config.repo} ({facts['commit'][:12]})" if facts["commit"] else ""
    return {"headline": f"{facts['name']}: {', '.join(facts['files'])}{pushed}", **facts}
