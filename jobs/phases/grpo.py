"""In-place GRPO of a model folder on tasks."""

from typing import Any

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import grpo
from megatron_ext.entrypoints.grpo import Config

STOPS = True


def check(config: Config, placement: Placement) -> list[Problem]:
    return grpo.check(config, placement.ranks, placement)


def forecast(config: Config, placement: Placement) -> dict[str, Any]:
    return grpo.forecast(config, placement)


def parallel_report(config: Config, placement: Placement, searching: bool) -> dict[str, Any]:
    return grpo.parallel_report(config, placement, searching)


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = grpo.run(config, task.out, task.keep, task.progress, task.stop)
    resumed = f", resumed at {facts['resumed_from']:,}" if facts["resumed_from"] else ""
    rewards = "no reward"
    if facts["reward_first"] is not None:
        rewards = f"reward {facts['reward_first']:.3f} → {facts['reward_last']:.3f}"
    text = f"step {facts['step']:,}{resumed}, {rewards}, {facts['trained_samples']:,} of {facts['samples']:,} samples trained"
    return {"headline": text, **facts}
