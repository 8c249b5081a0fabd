"""A phase kind for tests: adds up an upstream's numbers, on as many ranks as it is given."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.task import Task


@dataclass
class Config:
    numbers: str = field(default="", metadata={"input": True})
    factor: int = 1
    die_on_rank: int = field(default=-1, metadata={"keyed": False})


def run(config: Config, task: Task) -> dict[str, Any]:
    if config.die_on_rank == task.rank:
        raise RuntimeError(f"rank {task.rank} was told to die")
    total = config.factor * sum(map(int, (Path(config.numbers) / "numbers.txt").read_text().split()))
    if task.world_size > 1:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        seen = torch.ones(1)
        dist.all_reduce(seen)
        assert int(seen) == task.world_size
        dist.destroy_process_group()
    if task.rank == 0:
        (task.out / "total.txt").write_text(f"{total}\n")
    return {"total": total}
