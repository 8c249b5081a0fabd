"""Removes the rows that hold a question of an evaluated task from training data: an array over shares of the files."""

from pathlib import Path
from typing import Any

from data_tools.base.inside import expanded
from data_tools.base.one_file import bundle
from data_tools.base.tables import write_table
from data_tools.mistake import Problem
from data_tools.recipes import decontaminate
from data_tools.recipes.decontaminate import Config
from data_tools.records.shares import check_shares
from jobs.kind import Placement
from jobs.task import Task


def check(config: Config, placement: Placement) -> list[Problem]:
    files = [("inputs", expanded(name)) for name in config.inputs]
    return decontaminate.check(config) + check_shares(files, placement.elements)


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = decontaminate.decontaminate(config, task.out, task.index, task.count, progress=task.progress_or_stop)
    if task.count > 1:
        bundle(task.out)
    return facts


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    facts = decontaminate.finish(config, parts, task.out)
    for name, table in facts.pop("tables").items():
        write_table(task.keep, name, **table)
    asked = f"{facts['questions']:,} questions of {len(facts['by_evaluation'])} evaluation sets"
    if not config.inputs:
        return {"headline": asked, **facts}
    by_set = ", ".join(f"{rows:,} of {name}" for name, rows in facts["by_evaluation"].items() if rows)
    text = f"{facts['contaminated']:,} of {facts['rows']:,} rows hold a question{f' ({by_set})' if by_set else ''}"
    return {"headline": f"{asked}; {text}, {facts['kept']:,} kept", **facts}
