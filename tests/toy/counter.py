"""A phase kind for tests: counts steps, slowly, and can stop and go on; one number a step in its result."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.progress import Stopped
from jobs.task import Task

FREE = {"keyed": False}
STOPS = True


@dataclass
class Config:
    steps: int = 20
    seconds: float = field(default=0.05, metadata=FREE)  # a step
    loading: float = field(default=0.0, metadata=FREE)  # seconds before the first step, at every start
    every: int = field(default=0, metadata=FREE)  # steps between checkpoints; 0: only when stopped
    fail_from: int = field(default=0, metadata=FREE)  # the start that raises, counted from 0; 0: none
    gate: str = field(default="", metadata=FREE)  # a file without which it does not make its last step
    stuck: bool = field(default=False, metadata=FREE)  # makes no step at all


def run(config: Config, task: Task) -> dict[str, Any]:
    """Facts: starts, one entry a start with the step it began at."""
    checkpoint = task.keep / "counter.json"
    state = durable.read_json(checkpoint) if checkpoint.exists() else {"steps": [], "starts": []}
    steps: list[int] = state["steps"]
    starts = [*state["starts"], len(steps)]
    time.sleep(config.loading)
    if config.fail_from and len(starts) > config.fail_from:
        raise RuntimeError(f"start {len(starts) - 1} was told to fail")
    while len(steps) < config.steps:
        task.progress(len(steps), config.steps, "steps")
        if task.stop():
            durable.write_json(checkpoint, {"steps": steps, "starts": starts})
            raise Stopped(len(steps), config.steps)
        time.sleep(config.seconds)
        if config.stuck or (config.gate and len(steps) == config.steps - 1 and not Path(config.gate).exists()):
            continue
        steps.append(len(steps))
        if config.every and len(steps) % config.every == 0:
            durable.write_json(checkpoint, {"steps": steps, "starts": starts})
    (task.out / "numbers.txt").write_text(" ".join(map(str, steps)))
    return {"starts": starts}
