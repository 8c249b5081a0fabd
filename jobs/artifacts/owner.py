"""Who holds a lease, or a run's lock: a process of a host, and whether it is provably dead.

Nothing here knows Slurm: whether a job has ended is asked of the caller. No decision compares clocks.
"""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from data_tools.base import durable

ENVIRONMENT = "environment"  # of a lease: the SLURM_* variables of its owner


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what Slurm told a process; {} outside of a job."""
    told = {name: value for name, value in environment.items() if name.startswith("SLURM")}
    return told if "SLURM_JOB_ID" in told else {}


@dataclass(frozen=True)
class Owner:
    """Who holds a lease. (attempt, restart) orders owners; host, namespace, pid and start tell whether one is alive."""

    attempt: int
    restart: int
    job: str
    host: str
    pid: int
    started: int  # kernel start time of the pid in clock ticks since boot: a recycled pid differs
    namespace: str = ""  # where pid counts: a container on the same host may have pids of its own

    @staticmethod
    def me(attempt: int, restart: int, job: str = "") -> "Owner":
        """Return this process as an owner."""
        pid = os.getpid()
        return Owner(
            attempt=attempt,
            restart=restart,
            job=job,
            host=socket.gethostname(),
            pid=pid,
            started=process_start(pid) or 0,
            namespace=pid_namespace(),
        )

    @staticmethod
    def read(path: Path) -> "Owner | None":
        """Return the owner that a file names; None when it is torn or altered. Raises FileNotFoundError."""
        try:
            record = durable.read_checked(path)
            return Owner(**{field.name: record[field.name] for field in fields(Owner) if field.name in record})
        except (ValueError, TypeError):
            return None

    def record(self, environment: Mapping[str, str] | None = None) -> str:
        """Return the text of a lease's file: the owner, and what Slurm told it when it began."""
        told = asdict(self) | ({ENVIRONMENT: dict(environment)} if environment else {})
        return durable.canonical_json(durable.with_sum(told))

    @property
    def is_here(self) -> bool:
        """Whether its pid counts where this process looks."""
        return self.host == socket.gethostname() and self.namespace in ("", pid_namespace())

    def is_dead(self, slurm_says_ended: Callable[[str], bool]) -> bool:
        """Return True only when it is provable: the pid is gone from this host, or Slurm says that the job ended."""
        if self.is_here and process_start(self.pid) != self.started:
            return True
        return bool(self.job) and slurm_says_ended(self.job)


def pid_namespace() -> str:
    """Return what tells the pids of a container from those of its host; "" where the kernel does not say."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """Return the start time of a live process in clock ticks since boot; None when there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
