"""A phase kind for tests: writes conversations, as a filter of samples does."""

import json
from dataclasses import dataclass
from typing import Any

from jobs.task import Task


@dataclass
class Config:
    rows: int = 20


def run(config: Config, task: Task) -> dict[str, Any]:
    with open(task.out / "chat.jsonl", "w") as file:
        for row in range(config.rows):
            said = [
                {"role": "user", "content": f"Tell me of {row}."},
                {"role": "assistant", "content": f"It is {row}."},
            ]
            file.write(json.dumps({"messages": said}) + "\n")
    return {}
