"""A phase kind for tests: each element writes numbers, fan-in concatenates them. Can be slow, and can fail."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.mistake import Problem, UserMistake
from jobs.kind import Placement
from jobs.task import Task


@dataclass
class Config:
    start: int = 0
    seconds: float = field(default=0.0, metadata={"keyed": False})
    gate: str = field(default="", metadata={"keyed": False})  # a file that it waits for
    fail_at: int | None = field(default=None, metadata={"keyed": False})
    mistake: str = ""
    file: str = field(default="", metadata={"input": True})


def check(config: Config, placement: Placement) -> list[Problem]:
    return [Problem("start", f"{config.start} is negative; take 0")] if config.start < 0 else []


def run(config: Config, task: Task) -> dict[str, Any]:
    if config.mistake:
        raise UserMistake(config.mistake)
    if config.fail_at == task.index:
        raise RuntimeError(f"element {task.index} was told to fail")
    steps = max(1, int(config.seconds * 20))
    for step in range(steps):
        time.sleep(config.seconds / steps)
        task.progress(step + 1, steps, "naps")
    while config.gate and not Path(config.gate).exists():
        time.sleep(0.05)
    (task.out / "numbers.txt").write_text(f"{config.start + task.index}\n")
    return {"number": config.start + task.index}


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    text = "".join((part / "numbers.txt").read_text() for part in parts)
    (task.out / "numbers.txt").write_text(text)
    return {"numbers": len(parts)}
