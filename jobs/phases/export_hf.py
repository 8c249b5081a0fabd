"""A model folder back into a Hugging Face checkpoint that transformers loads."""

from typing import Any

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import export_hf
from megatron_ext.entrypoints.export_hf import Config


def check(config: Config, placement: Placement) -> list[Problem]:
    return export_hf.check(config, placement.ranks)


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = export_hf.run(config, task.out, task.keep, task.progress)
    size = sum(facts["bytes"].values())
    return {"headline": f"{len(facts['bytes'])} safetensors file(s), {size:,} bytes, {facts['dtype']}", **facts}
