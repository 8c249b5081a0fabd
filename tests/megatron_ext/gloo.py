"""Real gloo ranks for tests. The processes stay up between tests: each needs seconds to import torch and mcore."""

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

from data_tools.base.ports import free_port
from megatron_ext.device import init_device

TIMEOUT_S = 300


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def settle() -> None:
    """Let the collections that follow, several a test, pass over what is here now: a million objects of modules take
    a third of a second each time."""
    gc.collect()
    gc.freeze()


def _serve(connection: Any, rank: int, world_size: int) -> None:
    os.environ.update(environment(rank, world_size, 0))
    init_device()  # before the first task names a module that imports megatron-core
    while (task := connection.recv()) is not None:
        function, port, arguments = task
        os.environ["MASTER_PORT"] = str(port)
        settle()  # the task's modules have just been imported
        try:
            connection.send((True, function(**arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
            return  # a rank that failed leaves its peers in a collective: the pool starts anew
        gc.collect()  # models sit in reference cycles and keep their groups, each with a thread that polls


class Ranks:
    """`run(function, **arguments)` calls a module-level function on every rank and returns the results by rank."""

    serve = staticmethod(_serve)  # what each process does

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=self.serve, args=(theirs, rank, self.world_size), daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))

    def run(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Raises AssertionError with the rank's traceback where one failed or went silent."""
        if not self._processes:
            self._start()
        port = free_port()
        for _, connection in self._processes:
            connection.send((function, port, arguments))
        results, failures = [], []
        for rank, (_, connection) in enumerate(self._processes):
            try:
                good = connection.poll(5 if failures else TIMEOUT_S)
                good, value = connection.recv() if good else (False, f"no answer in {TIMEOUT_S} s")
            except (EOFError, ConnectionResetError):
                good, value = False, "the process died"
            (results if good else failures).append(value if good else f"rank {rank}: {value}")
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        for process, _ in self._processes:
            process.kill()
            process.join()
        self._processes = []
