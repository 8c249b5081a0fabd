"""Starts `afterok` as forks of one process that has its modules imported already: importing them costs more than most
commands do.

    python -m tests.forks SOCKET     # one for each pytest process, started by tests.command

Each fork is a process of its own, with its own words, environment, umask and streams, and ends as `python -m
launchers.cli` does: its output is a pipe, read until nobody can write into it any more. What is read of the environment
only when Python, its libraries or a module of theirs begins cannot be changed by then (`AT_START`), and the seed of
hashes is one for all forks: tests of what must not depend on it start Python themselves.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from runpy import run_module

ROOT = Path(__file__).parents[1]
CLI = "launchers.cli"
# Variables with these beginnings are read when Python or a library starts: NumPy's, submitit's, the C library's.
AT_START = (
    "PYTHON", "LC_", "LANG", "LD_", "TZ", "MALLOC_", "GLIBC_", "OMP_", "OPENBLAS_", "NPY_", "NUMPY_", "SUBMITIT_",
)  # fmt: skip
MOST_BYTES = 1 << 17  # of the words and environment of one command


class Forks:
    """Asks the process of forks, which it starts, for one command after the other."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.at_start = _at_start(os.environ)
        command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
        self.server = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
        theirs.close()

    def may_run(self, env: Mapping[str, str]) -> bool:
        """Return whether a command with this environment does in a fork what it does in a new process."""
        return _at_start(env) == self.at_start

    def run(self, words: Sequence[str], env: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess:
        """Run one command to its end. Raises subprocess.TimeoutExpired as subprocess.run does."""
        request = json.dumps({"words": words, "env": dict(env), "umask": _umask()}).encode(errors="surrogateescape")
        assert len(request) < MOST_BYTES, f"{len(request)} bytes of words and environment"
        pipes = [os.pipe() for _ in range(3)]
        socket.send_fds(self.socket, [request], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        told = os.read(pipes[2][0], 64)  # its pid, then how it ended
        assert told, "the process of forks has ended"
        is_over, (out, err, more) = _read([read for read, _ in pipes], time.monotonic() + timeout)
        pid, *code = map(int, (told.decode() + more).split())
        if not is_over:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired([CLI, *words], timeout, out, err)
        return subprocess.CompletedProcess([CLI, *words], code[0], out, err)


def _at_start(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(AT_START)}


def _umask() -> int:
    now = os.umask(0o077)
    os.umask(now)
    return now


def _read(pipes: Sequence[int], until: float) -> tuple[bool, list[str]]:
    """Return (whether nobody can write any more, which is awaited, the text of each pipe), and close them."""
    got = {pipe: bytearray() for pipe in pipes}
    still = set(pipes)
    while still and (ready := select.select(still, [], [], max(0.0, until - time.monotonic()))[0]):
        for pipe in ready:
            more = os.read(pipe, 1 << 16)
            got[pipe] += more
            still -= set() if more else {pipe}
    for pipe in pipes:
        os.close(pipe)
    return not still, [io.TextIOWrapper(io.BytesIO(data)).read() for data in got.values()]


def serve(asked: socket.socket) -> None:
    """Fork for each command that is asked for, until nobody can ask any more; return in the fork, ready to run it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for the commands
    while True:
        request, files, _, _ = socket.recv_fds(asked, MOST_BYTES, 3)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            asked.close()
            return _command(json.loads(request.decode(errors="surrogateescape")), *files)
        for file in files:
            os.close(file)


def _command(request: dict, out: int, err: int, tell: int) -> None:
    """Become one command; what forks it tells its pid and exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        os.close(out)
        os.close(err)
        os.write(tell, f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(tell, f"{code}\n".encode())
        os._exit(0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for file in (out, err, tell):
        os.close(file)
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [CLI, *request["words"]]


def import_all() -> None:
    """Import what commands import, and leave the command line itself to be run."""
    for name in ("slurm", "jobs", "launchers"):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            importlib.import_module(module.name)
    del sys.modules[CLI]
    gc.freeze()  # a fork need not copy what the collector would touch


if __name__ == "__main__":
    asked_by = socket.socket(fileno=int(sys.argv[1]))
    import_all()
    serve(asked_by)
    run_module(CLI, run_name="__main__", alter_sys=True)
