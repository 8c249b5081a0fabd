"""A phase kind for tests whose elements write a file and tell nothing: no progress, no facts."""

from dataclasses import dataclass
from pathlib import Path

from jobs.task import Task


@dataclass
class Config:
    text: str = "done"


def run(config: Config, task: Task) -> None:
    (task.out / "said.txt").write_text(config.text)


def finish(parts: list[Path], config: Config, task: Task) -> None:
    (task.out / "said.txt").write_text(str(len(parts)))
