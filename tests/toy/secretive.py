"""A phase kind for tests: uses a variable of its environment, and can be as careless with it as code is."""

import ctypes
import hashlib
import os
import subprocess
import time
from dataclasses import dataclass, field
from typing import Any

from data_tools.mistake import UserMistake
from jobs.task import Task


@dataclass
class Config:
    variables: list[str] = field(default_factory=list)
    leak: str = field(default="", metadata={"keyed": False})  # print, error, mistake, facts
    seconds: float = field(default=0.0, metadata={"keyed": False})


def run(config: Config, task: Task) -> dict[str, Any]:
    values = [os.environ[name] for name in config.variables]
    if config.leak == "print":
        print("the environment:", dict(os.environ), flush=True)
        ctypes.CDLL(None).write(2, *(lambda text: (text, len(text)))(f"native: {values}\n".encode()))
        subprocess.run(["env"], check=True)
    if config.leak == "error":
        raise RuntimeError(f"401 Unauthorized: https://example.org/?key={values[0]} {values!r}")
    if config.leak == "mistake":
        raise UserMistake(f"key {values[0]} is refused; get another")
    for _ in range(int(config.seconds * 20)):
        time.sleep(0.05)
        if (task.keep / "enough").exists():
            break
    if task.rank == 0:
        (task.out / "digests.txt").write_text("".join(hashlib.sha256(v.encode()).hexdigest() + "\n" for v in values))
    return {"said": values if config.leak == "facts" else []}
