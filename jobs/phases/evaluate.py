"""Measures the accuracy of a model folder, on a task's rows or on the tasks of a mix, each by itself.

An array over prompts (array: 4), or over the tasks of a mix (array: [gsm8k, math500]); counts are added up.
"""

from pathlib import Path
from typing import Any

from data_tools.base.one_file import bundle
from data_tools.evaluations.accuracy import headline
from data_tools.mistake import Problem
from data_tools.tasks import mix
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import evaluate
from megatron_ext.entrypoints.evaluate import Config
from megatron_ext.parallel.parts import OPENAI
from megatron_ext.preflight import facts
from megatron_ext.rollout import endpoint

OF_ELEMENTS = ("engine",)
STOPS = True
ELSEWHERE = {
    "sampling": "evaluate has its settings beside the others: max_new_tokens, temperature and top_p",
    "max_tokens": "evaluate calls it max_new_tokens",
}


def check(config: Config, placement: Placement) -> list[Problem]:
    named = [Problem("mix", f"array: {wrong}") for wrong in evaluate.check_elements(config, placement.values)]
    if named and not evaluate.of_mix(config):
        return named  # what the default task lacks would mislead whoever named tasks in the array alone
    return evaluate.check(config, placement.ranks, placement) + named


def remarks(config: Config, placement: Placement) -> list[str]:
    return facts.remarks(config.mix, config.model, placement)


def datasets(config: Config) -> list[str]:
    return mix.datasets(config.mix)


def secrets(config: Config) -> dict[str, str]:
    return endpoint.secrets(config.endpoint) if config.backend == OPENAI else {}


def run(config: Config, task: Task) -> dict[str, Any]:
    share = {"only": task.value} if isinstance(task.value, str) else {}
    facts = evaluate.run(
        config,
        task.out,
        task.keep,
        progress=task.progress,
        stop=task.stop,
        index=task.index,
        count=task.count,
        shared=task.shared_keep,
        **share,
    )
    if task.count > 1 and task.rank == 0:
        bundle(task.out)
    return facts


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    facts = evaluate.finish(config, parts, task.out, task.keep)
    return {"headline": headline(facts), **facts}
