"""Writes a Hugging Face folder, or an adapter in PEFT's format, as a GGUF file, by llama.cpp's own converter."""

from typing import Any

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import export_gguf
from megatron_ext.entrypoints.export_gguf import Config


def check(config: Config, placement: Placement) -> list[Problem]:
    return export_gguf.check(config, placement.ranks, placement)


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = export_gguf.run(config, task.out, task.keep, task.progress)
    notes = "".join(f"; {said}" for said in facts["differs"])
    return {
        "headline": f"{facts['file']}, {facts['bytes']:,} bytes, {facts['outtype']}, by {facts['converter']}{notes}",
        **facts,
    }
