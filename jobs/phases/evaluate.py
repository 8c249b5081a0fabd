"""Accuracy of a model folder on a task's rows, or on a mix of tasks: an array over prompts, counts added up."""

from pathlib import Path
from typing import Any

from data_tools.mistake import Problem
from data_tools.tasks import mix
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import evaluate
from megatron_ext.entrypoints.accuracy import headline
from megatron_ext.entrypoints.evaluate import Config


def check(config: Config, placement: Placement) -> list[Problem]:
    return evaluate.check(config, placement.ranks, placement)


def datasets(config: Config) -> list[str]:
    return mix.datasets(config.mix)


def run(config: Config, task: Task) -> dict[str, Any]:
    return evaluate.run(config, task.out, task.keep, progress=task.progress_or_stop, index=task.index, count=task.count)


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    facts = evaluate.finish(config, parts, task.out, task.keep)
    return {"headline": headline(facts), **facts}
