"""A phase kind for tests: ends in the way it is told."""

import datetime
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from data_tools.mistake import UserMistake
from jobs.task import Task
from megatron_ext.training.watch import Hang, Watch


@dataclass
class Config:
    how: str = field(default="", metadata={"keyed": False})


def run(config: Config, task: Task) -> dict[str, Any]:
    if config.how == "exception":
        raise ValueError("row 7 has 3 columns, not 4")
    if config.how == "mistake":
        raise UserMistake("row 7 is empty; remove it")
    if config.how == "memory":
        raise MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)")
    if config.how == "gpu memory":
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB")
    if config.how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if config.how == "collective":
        _wait_for_a_peer_that_never_comes(task.rank)
    if config.how == "hang":
        with Watch(Hang(floor_s=0.3, grace_s=0.1), task.keep / "stacks", task.rank).watching():
            time.sleep(600)
    if config.how == "sleep":
        print("sleeping", flush=True)
        time.sleep(600)
    (task.out / "done.txt").write_text("done\n")
    return {}


def _wait_for_a_peer_that_never_comes(rank: int) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=5))
    dist.barrier()
    if rank:
        time.sleep(600)
    dist.all_reduce(torch.ones(1))
