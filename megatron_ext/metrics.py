"""Where the numbers of a training go: metrics.jsonl, always."""

import json
import math
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_tools import durable


class Metrics:
    """metrics.jsonl on rank 0, one line every `log_every` steps. A step is in it once, resumed or not."""

    def __init__(self, path: Path, resumed_from: int):
        self.path = path
        self.writer = dist.get_rank() == 0
        if self.writer and path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resumed_from]
            durable.write_file(path, "".join(line + "\n" for line in kept))

    def append(self, values: dict[str, Any]) -> None:
        if self.writer:
            with open(self.path, "a") as file:  # not fsynced: a line lost in a power cut is written again
                file.write(json.dumps(values) + "\n")


def _step_of(line: str) -> float:
    """The step of a metrics line; inf for a torn one, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
