"""Samples a model folder on the prompts of tasks, for reject_filter to choose from: an array over prompts."""

from pathlib import Path
from typing import Any

from data_tools.mistake import Problem
from data_tools.tasks import mix
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import generate
from megatron_ext.entrypoints.generate import Config
from megatron_ext.parallel.parts import OPENAI
from megatron_ext.preflight import facts
from megatron_ext.rollout import endpoint

OF_ELEMENTS = ("engine",)
STOPS = True
ELSEWHERE = {name: f"generate calls it sampling.{name}" for name in ("max_tokens", "temperature", "top_p")}
ELSEWHERE["max_new_tokens"] = "generate calls it sampling.max_tokens"


def check(config: Config, placement: Placement) -> list[Problem]:
    return generate.check(config, placement.ranks, placement)


def remarks(config: Config, placement: Placement) -> list[str]:
    return facts.remarks(config.mix, config.model, placement)


def datasets(config: Config) -> list[str]:
    return mix.datasets(config.mix)


def secrets(config: Config) -> dict[str, str]:
    return endpoint.secrets(config.endpoint) if config.backend == OPENAI else {}


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = generate.run(
        config,
        task.out,
        task.keep,
        progress=task.progress,
        stop=task.stop,
        index=task.index,
        count=task.count,
        shared=task.shared_keep,
    )
    return _told(facts)


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    return _told(generate.finish(config, parts, task.out, task.keep))


def _told(facts: dict[str, Any]) -> dict[str, Any]:
    text = f"{facts['samples']:,} samples of {facts['prompts']:,} prompts, {facts['tokens']:,} tokens"
    text += f", {facts['correct']:,} correct" if facts["accuracy"] is not None or "reward" not in facts else ""
    if "reward" in facts:
        text += f", mean reward {facts['reward']:.3f}" + (
            f", regret {facts['regret']:.3f}" if "regret" in facts else ""
        )
    others = ", ".join(f"{facts[name]:,} {name}" for name in ("truncated", "unscored") if facts[name])
    return {"headline": f"{text}{f' ({others})' if others else ''}", **facts}
