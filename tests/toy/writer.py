"""A phase kind for tests: writes so many MiB, as a phase that does not know how full the disk is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.task import Task

MIB = 1 << 20


@dataclass
class Config:
    mib: int = 1
    after: str = field(default="", metadata={"input": True})


def run(config: Config, task: Task) -> dict[str, Any]:
    with open(task.out / "bytes", "wb") as file:
        for done in range(config.mib):
            file.write(b"x" * MIB)
            task.progress(done + 1, config.mib, "MiB")
    return {"mib": config.mib, "before": len(list(Path(config.after).rglob("*"))) if config.after else 0}
