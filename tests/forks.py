"""Starts `afterok` as forks of one process that has its modules imported already: importing them costs more than most
commands do.

    python -m tests.forks SOCKET     # one for each pytest process, started by tests.command

Each fork is a process of its own, with its own words, environment, umask and streams, and ends as `python -m
launchers.cli` does. What Python reads of the environment only when it starts cannot be changed by then: see `warm`.
"""

import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from runpy import run_module
from typing import IO

ROOT = Path(__file__).parents[1]
CLI = "launchers.cli"
AT_START = ("PYTHON", "LC_", "LANG", "LD_")  # variables with these beginnings are read when Python starts
MOST_BYTES = 1 << 17  # of the words and environment of one command


class Forks:
    """Asks the process of forks, which it starts, for one command after the other."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.at_start = _at_start(os.environ)
        command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
        self.server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()

    def may_run(self, env: Mapping[str, str]) -> bool:
        """Return whether a command with this environment does in a fork what it does in a new process."""
        return _at_start(env) == self.at_start

    def run(self, words: Sequence[str], env: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess:
        """Run one command to its end. Raises subprocess.TimeoutExpired as subprocess.run does."""
        request = json.dumps({"words": words, "env": dict(env), "umask": _umask()}).encode(errors="surrogateescape")
        assert len(request) < MOST_BYTES, f"{len(request)} bytes of words and environment"
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            told, tell = os.pipe()
            socket.send_fds(self.socket, [request], [out.fileno(), err.fileno(), tell])
            os.close(tell)
            with open(told) as answers:
                pid = int(answers.readline())
                if not select.select([answers], [], [], timeout)[0]:
                    os.kill(pid, signal.SIGKILL)
                    raise subprocess.TimeoutExpired([CLI, *words], timeout, _text(out), _text(err))
                code = int(answers.readline())
            return subprocess.CompletedProcess([CLI, *words], code, _text(out), _text(err))


def _at_start(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(AT_START)}


def _umask() -> int:
    now = os.umask(0o077)
    os.umask(now)
    return now


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


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
