"""Sampled completions to JSONL chat: right, well-formed, not too alike, some a prompt, none of an evaluation set."""

from typing import Any

from data_tools.base.tables import write_table
from data_tools.mistake import Problem
from data_tools.prepare import rejection
from data_tools.prepare.rejection import Config
from jobs.kind import Placement
from jobs.task import Task


def check(config: Config, placement: Placement) -> list[Problem]:
    return rejection.check(config)


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = rejection.reject_filter(config, task.out, task.progress)
    write_table(task.keep, "balance", **facts.pop("table"))
    text = (
        f"{facts['kept']:,} of {facts['samples']:,} samples kept, of {facts['prompts_left']:,} of "
        f"{facts['prompts']:,} prompts"
    )
    return {"headline": text, **facts}
