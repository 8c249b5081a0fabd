"""Turns CSV prompts with action values into prompts with rewards: the Boltzmann softmax of each row's `q_action_*`."""

from typing import Any

from data_tools.prepare import q_rewards
from data_tools.prepare.q_rewards import Config
from jobs.task import Task


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = q_rewards.q_rewards(config, task.out, task.progress)
    return {"headline": f"{facts['rows']:,} rows in {len(facts['files'])} files, tau {config.tau:g}", **facts}
