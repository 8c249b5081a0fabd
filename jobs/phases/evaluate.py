"""Greedy accuracy of a model folder on a task's rows: an array over prompts, counts added up."""

from pathlib import Path
from typing import Any

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import evaluate
from megatron_ext.entrypoints.evaluate import Config


def check(config: Config, placement: Placement) -> list[Problem]:
    return evaluate.check(config, placement.ranks)


def run(config: Config, task: Task) -> dict[str, Any]:
    return evaluate.run(config, task.out, task.keep, task.progress, task.index, task.count)


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    return evaluate.finish(config, parts, task.out, task.keep)
