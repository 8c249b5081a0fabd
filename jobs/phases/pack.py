"""A token store's documents into packs of one length: the plan of every batch, apart from the tokens."""

from typing import Any

from data_tools import pack
from data_tools.mistake import Problem
from data_tools.pack import Config
from jobs.kind import Placement
from jobs.task import Task


def check(config: Config, placement: Placement) -> list[Problem]:
    return pack.check(config)


def run(config: Config, task: Task) -> dict[str, Any]:
    return pack.pack(config, task.out, task.progress)
