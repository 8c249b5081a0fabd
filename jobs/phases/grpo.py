"""Trains a model folder by GRPO on tasks; the model in training draws the samples itself."""

from typing import Any

from data_tools.mistake import Problem
from data_tools.tasks import mix
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import grpo
from megatron_ext.entrypoints.grpo import Config, costs, forecast, parallel_report
from megatron_ext.rl.untrained import told

__all__ = ["ELSEWHERE", "STOPS", "Config", "check", "costs", "datasets", "forecast", "parallel_report", "run"]

STOPS = True
ELSEWHERE = {name: f"grpo calls it sampling.{name}" for name in ("max_tokens", "temperature", "top_p")}
ELSEWHERE |= {"max_new_tokens": "grpo calls it sampling.max_tokens", "log_every": "grpo logs every step"}


def check(config: Config, placement: Placement) -> list[Problem]:
    return grpo.check(config, placement.ranks, placement)


def datasets(config: Config) -> list[str]:
    return mix.datasets(config.mix)


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = grpo.run(config, task.out, task.keep, progress=task.progress, stop=task.stop)
    resumed = f", resumed at {facts['resumed_from']:,}" if facts["resumed_from"] else ""
    rewards = "no reward"
    if facts["reward_first"] is not None:
        rewards = f"reward {facts['reward_first']:.3f} → {facts['reward_last']:.3f}"
    text = (
        f"step {facts['step']:,}{resumed}, {rewards}, {facts['trained_samples']:,} of {facts['samples']:,} samples "
        "trained"
    )
    if others := told(facts):
        text += f" ({others})"
    if facts["idle_replicas"]:
        text += f"; replicas with nothing to draw: {facts['idle_replicas']:,}"
    return {"headline": "; ".join([text, *facts["bounds"]]), **facts}
