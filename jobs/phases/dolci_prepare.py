"""Draws a stratified English sample of Dolci-Think of a target number of rows: an array over its shards."""

from pathlib import Path
from typing import Any

from data_tools.base.inside import expanded
from data_tools.base.one_file import bundle
from data_tools.base.tables import write_table
from data_tools.mistake import Problem
from data_tools.prepare import dolci
from data_tools.prepare.dolci import Config
from data_tools.records.shares import check_shares
from jobs.kind import Placement
from jobs.task import Task


def check(config: Config, placement: Placement) -> list[Problem]:
    return dolci.check(config) + check_shares(
        [("inputs", expanded(name)) for name in config.inputs], placement.elements
    )


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = dolci.sample_shard(config, task.out, task.index, task.count, progress=task.progress)
    if task.count > 1:
        bundle(task.out)
    return facts


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    facts = dolci.draw(config, parts, task.out, task.progress)
    for name, table in facts.pop("tables").items():
        write_table(task.keep, name, **table)
    short = ", ".join(f"{name} {rows:,} short" for name, rows in facts["short"].items())
    return {
        "headline": f"{facts['rows']:,} of {config.target_rows:,} rows drawn{f' ({short})' if short else ''}",
        **facts,
    }
