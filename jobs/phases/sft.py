"""Supervised fine-tuning of a model folder on packs."""

from typing import Any

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import sft
from megatron_ext.entrypoints.sft import Config


def check(config: Config, placement: Placement) -> list[Problem]:
    return sft.check(config, placement.ranks)


def run(config: Config, task: Task) -> dict[str, Any]:
    return sft.run(config, task.out, task.keep, task.progress)
