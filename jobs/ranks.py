"""The ranks of one element: found in Slurm's environment or spawned here, and one verdict for all of them.

Rank 0 leases, checks and seals; the others learn its verdict before any of them exits, over a store that nobody without
the submission's key can enter (data_tools/base/rendezvous.py) and that torch.distributed then uses too.
"""

import contextlib
import ctypes
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from data_tools.base import rendezvous
from data_tools.base.ports import free_port
from data_tools.base.rendezvous import Meeting
from data_tools.base.rendezvous_server import Server
from data_tools.mistake import UserMistake
from jobs import stopping
from jobs.retry import EXIT_UNFINISHED

VERDICT_LIMIT_S = 3600.0  # rank 0 may hash large upstream files before it speaks
GOODBYE_LIMIT_S = 30.0
KILL_AFTER_S = 5.0  # from the end of one rank to the KILL of those left
SAME_MOMENT_S = 0.5  # between two ranks that ended for one cause
PR_SET_PDEATHSIG = 1
SPAWN_VARIABLE = "AFTEROK_SPAWN"  # tells the ranks of one spawn_ranks from those of another


@dataclass(frozen=True)
class Rank:
    """Which of an element's ranks a process is: in all, and on its node."""

    rank: int
    local_rank: int
    world_size: int


def rank_from_environment(environ: Mapping[str, str], expected: int) -> Rank | None:
    """Return this process's rank, None when it is no rank of a set of `expected` and has to spawn them.

    A batch script and a login shell inside an allocation carry SLURM_PROCID=0 too; only a step of the right size
    is our srun. Raise UserMistake where a variable holds no number.
    """
    if "AFTEROK_RANK" in environ:
        return Rank(*(number_of(environ, name) for name in ("AFTEROK_RANK", "LOCAL_RANK", "WORLD_SIZE")))
    in_step = "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ
    if in_step and number_of(environ, "SLURM_STEP_NUM_TASKS", "1") == expected:
        return Rank(number_of(environ, "SLURM_PROCID"), number_of(environ, "SLURM_LOCALID", "0"), expected)
    return Rank(0, 0, 1) if expected == 1 else None


def number_of(environ: Mapping[str, str], name: str, default: str = "") -> int:
    """Return the whole number in a variable that a launcher sets. Raise UserMistake where it holds none."""
    text = environ.get(name, default)
    if not re.fullmatch("[0-9]{1,9}", text):
        said = f"{text!r:.40} is no whole number" if name in environ else "is not set"
        raise UserMistake(f"variable {name}: {said}; Slurm's srun, or afterok, sets it for a rank: unset it elsewhere")
    return int(text)


def torch_environment(rank: Rank, gpus: int) -> dict[str, str]:
    """Return what torch.distributed's env:// reads, but for MASTER_ADDR and MASTER_PORT, which the parent has set.

    Our own training meets at `Verdicts`' store instead; the port is for phases that call torch.distributed themselves.
    """
    env = {"RANK": str(rank.rank), "LOCAL_RANK": str(rank.local_rank), "WORLD_SIZE": str(rank.world_size)}
    return env | thread_environment(gpus)


def thread_environment(gpus: int) -> dict[str, str]:
    """Return variables that have CPU ranks sum in one order, wherever they run: one thread each."""
    return {} if gpus else {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def die_with_parent() -> None:
    """Have this process killed with its parent, for `preexec_fn`: no rank or worker must train on as an orphan."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def spawn_ranks(command: list[str], world_size: int, gpus: int) -> int:
    """Run `command` once a rank on this machine; the first bad exit ends all. Returns that exit code.

    Stop signals are passed on to every rank; those that come meanwhile wait until the ranks can take them.
    """
    base = (
        os.environ
        | thread_environment(gpus)
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), SPAWN_VARIABLE: uuid.uuid4().hex}
    )
    stopping.hold()  # the ranks inherit it and release once their handlers are in place
    children = [
        subprocess.Popen(
            command,
            preexec_fn=die_with_parent,
            env=base | {"AFTEROK_RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
        )
        for rank in range(world_size)
    ]

    def forward(number: int, _: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    stopping.release()
    try:
        return _wait_for_all(children)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_for_all(children: list[subprocess.Popen]) -> int:
    """Wait for all ranks, ending the others soon after one failed; return the exit code of that one."""
    worst, first = 0, math.inf
    deadline: float | None = None
    while None in [child.poll() for child in children]:  # a list: every child is polled, not only the first alive
        # A rank killed by a signal (negative) is the cause where another failed within the same moment, for want of it:
        # a killed process closes what the other reads before it can be waited for.
        bad = min((child.returncode for child in children if child.returncode), default=0)
        first = min(first, time.monotonic()) if bad else first
        if not worst and (bad < 0 or time.monotonic() - first > SAME_MOMENT_S):
            worst = exit_code(bad)
            deadline = time.monotonic() + KILL_AFTER_S
            for other in children:  # those that were asked to stop with this one, and are slower, need no second word
                if other.poll() is None and worst != EXIT_UNFINISHED:
                    other.terminate()
        if deadline is not None and time.monotonic() > deadline:
            for other in children:
                if other.poll() is None:
                    other.kill()
        time.sleep(0.02)
    codes = [child.returncode for child in children]
    return worst or exit_code(min(codes)) or max(codes)


def exit_code(returncode: int) -> int:
    """Return a Popen's returncode as a shell sees it: 128 + signal for a killed process."""
    return 128 - returncode if returncode < 0 else returncode


Result = TypeVar("Result")


class Verdicts:
    """One decision for all ranks of an element. With one rank everything is a plain call."""

    def __init__(self, rank: Rank, meeting: Callable[[], Meeting]):
        """Meet the other ranks, if there are any. Raises MeetingFailed."""
        self.rank = rank
        self.store: rendezvous.Client | None = None
        if rank.world_size > 1:
            place = meeting()
            server = Server(place) if rank.rank == 0 else None
            self.store = rendezvous.Client(place, VERDICT_LIMIT_S, server.port if server else None)
            os.environ.update(rendezvous.to_environment(place, self.store.port))

    def decide(self, name: str, function: Callable[[], Result]) -> Result:
        """Call `function` on rank 0 and return its result, which JSON can hold, on every rank."""
        if self.store is None:
            return function()
        if self.rank.rank == 0:
            result = function()
            self.store.set(f"afterok/{name}", json.dumps(result).encode())
            return result
        return json.loads(self.store.get(f"afterok/{name}"))

    def hand_over(self, name: str, function: Callable[[], Result]) -> Result:
        """Do as `decide` does, and have the store forget the result once every rank has it."""
        result = self.decide(name, function)
        self.gather(f"{name}/heard")
        if self.store is not None and self.rank.rank == 0:
            self.store.delete(f"afterok/{name}")
        return result

    def gather(self, name: str, word: str = "") -> list[str]:
        """Wait on rank 0 for every rank and return all words, its own first; the others return [] at once."""
        if self.store is None:
            return [word]
        if self.rank.rank:
            self.store.set(f"afterok/{name}/{self.rank.rank}", word.encode())
            return []
        others = [f"afterok/{name}/{r}" for r in range(1, self.rank.world_size)]
        return [word, *(said.decode() for said in self.store.multi_get(others))]

    def goodbye(self) -> None:
        """Leave, rank 0 last: it hosts the store."""
        if self.store is None:
            return
        if self.rank.rank:
            with contextlib.suppress(rendezvous.MeetingFailed):  # rank 0 knows, or is gone
                self.store.set(f"afterok/bye/{self.rank.rank}", b"1")
            return
        try:
            self.store.wait([f"afterok/bye/{r}" for r in range(1, self.rank.world_size)], GOODBYE_LIMIT_S)
        except Exception as error:  # a rank that died after the seal changes nothing
            print(f"a rank left without a word: {error}", file=sys.stderr)
