"""Turns CSV prompts into Harmony chat prompts, the format of gpt-oss; NAME.csv becomes NAME_harmony.csv."""

from typing import Any

from data_tools.base.tables import write_table
from data_tools.mistake import Problem
from data_tools.prepare import harmony
from data_tools.prepare.harmony import Config
from jobs.kind import Placement
from jobs.task import Task


def check(config: Config, placement: Placement) -> list[Problem]:
    return harmony.check(config)


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = harmony.harmony_convert(config, task.out, task.progress)
    write_table(task.keep, "balance", **facts.pop("table"))
    return {"headline": f"{facts['rows']:,} prompts in {len(facts['files'])} files, dated {config.date}", **facts}
